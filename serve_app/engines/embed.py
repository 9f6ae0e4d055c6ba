"""Embeddings: texts in, unit vectors out, for models in the layout of sentence-transformers and plain encoders.

``modules.json`` names the steps: the encoder, how its token vectors are pooled, whether the result is normalised
(https://sbert.net/docs/package_reference/sentence_transformer/models.html). A folder without it gets the mean of its
token vectors, normalised. Other steps are refused: a vector that leaves one out would be wrong without looking so.

Requests that come while the model computes are computed together after it: sorted by length, padded on the right, in
batches of at most ``batch_tokens`` (extra, default 16,384) tokens, padding included. A text gets the same vector alone
and in a batch, up to rounding.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.domain.catalog import ModelInfo, Task
from serve_app.domain.embeddings import Embeddings
from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    InvalidConfig,
    InvalidInput,
    ModelLoadFailed,
)
from serve_app.domain.generation import GenerationRequest, Item, Marks
from serve_app.engines.base import Counters, EngineOptions, Progress, no_progress
from serve_app.engines.faults import translate
from serve_app.engines.ledger import Ledger, check_room, shutting_down
from serve_app.engines.memory import extra

log = logging.getLogger(__name__)

EXTRA = frozenset({"use_gpu", "batch_tokens"})
STEPS = {"Transformer", "Pooling", "Normalize"}
POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done with the token vectors; ``prefix`` goes before every text."""

    poolings: tuple[str, ...] = ("mean_tokens",)
    normalise: bool = True
    prefix: str = ""


def read_recipe(folder: Path) -> Recipe:
    """The steps that the model's files name.

    Raises:
        ModelLoadFailed: they name one that is not known here.
    """
    modules = _read(folder / "modules.json")
    prompts = _read(folder / "config_sentence_transformers.json") or {}
    prefix = str((prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), ""))
    if modules is None:
        return Recipe(prefix=prefix)
    kinds = {str(module.get("type")).rpartition(".")[2]: str(module.get("path")) for module in modules}
    unknown = sorted(set(kinds) - STEPS)
    if unknown:
        raise ModelLoadFailed(f"The model embeds in steps that are not known here: {', '.join(unknown)}.")
    config = _read(folder / Path(kinds.get("Pooling", "1_Pooling")).name / "config.json") or {}
    said = [mode for mode in POOLINGS if config.get(f"pooling_mode_{mode}")]
    if not said and (mode := config.get("pooling_mode")):
        said = [name for name in POOLINGS if name.removesuffix("_tokens").removesuffix("_token") == mode]
    if config and not said:
        raise ModelLoadFailed("The model pools its token vectors in a way that is not known here.")
    return Recipe(tuple(said) or ("mean_tokens",), "Normalize" in kinds, prefix)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(eq=False, slots=True)
class _Job:
    ids: list[list[int]]
    done: asyncio.Future[list[list[float]]]
    marks: Marks


class EmbeddingEngine:
    """Implements :class:`serve_app.engines.base.Embedder`; made by :func:`create`."""

    def __init__(self, loaded: Any, recipe: Recipe, options: EngineOptions) -> None:
        self._info: ModelInfo = loaded.info
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._recipe = recipe
        self._options = options
        self._limit = min(filter(None, (loaded.info.context_length, options.context_length)), default=512)
        self._batch_tokens = int(extra(options, "batch_tokens", 16_384))
        self._ledger = Ledger()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._waiting: list[_Job] = []
        self._pump: asyncio.Task[None] | None = None
        self._closed = False
        steps = [*recipe.poolings, *(["normalised"] if recipe.normalise else [])]
        self._description = f"embeddings on {loaded.device}, {loaded.dtype}, {', '.join(steps)}"

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def description(self) -> str:
        return self._description

    def __repr__(self) -> str:
        return f"EmbeddingEngine({self._info.id!r}, {len(self._waiting)} waiting, {self._ledger.snapshot()})"

    def counters(self) -> Counters:
        return self._ledger.snapshot()

    def check_health(self) -> None:
        if self._closed:
            raise shutting_down()

    async def close(self) -> None:
        self._closed = True
        for job in self._waiting:
            if not job.done.done():
                job.done.set_exception(shutting_down())
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown, True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        """Refuse: the model makes vectors, no text."""
        raise CapabilityMissing(f"{self._info.id} makes embeddings, no text. POST /v1/embeddings asks it.")
        yield  # type: ignore[unreachable]  # it makes this a generator

    async def embed(self, texts: Sequence[str], marks: Marks | None = None) -> Embeddings:
        """One vector for each text, in their order.

        Raises:
            InvalidInput: there is no text, or an empty one.
            ContextLengthExceeded: a text is longer than the model reads.
            QueueFull: too many requests wait already.
        """
        self._ledger.enter()
        place, outcome = "waiting", "failed"
        try:
            self.check_health()
            check_room(self._ledger.snapshot(), self._options)
            ids = await asyncio.get_running_loop().run_in_executor(None, self._tokenize, list(texts))
            self._ledger.start()
            place = "running"
            vectors = await self._compute(ids, marks or Marks())
            outcome = "finished"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._ledger.leave(place, outcome)  # type: ignore[arg-type]
        tokens = sum(map(len, ids))
        self._ledger.count(prompt_tokens=tokens)
        return Embeddings(tuple(tuple(vector) for vector in vectors), tokens)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts or any(not text.strip() for text in texts):
            raise InvalidInput("There is nothing to embed: give one text or more, none of them empty.")
        prefixed = [self._recipe.prefix + text for text in texts]
        ids: list[list[int]] = self._tokenizer(prefixed, truncation=False, verbose=False)["input_ids"]
        longest = max(map(len, ids))
        if longest > self._limit:
            raise ContextLengthExceeded(
                f"A text has {longest:,} tokens; the model reads {self._limit:,}. Cut it in parts.",
                details={"promptTokens": longest, "contextLength": self._limit},
            )
        return ids

    async def _compute(self, ids: list[list[int]], marks: Marks) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        job = _Job(ids, loop.create_future(), marks)
        self._waiting.append(job)
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._work())
        return await job.done

    async def _work(self) -> None:
        """Compute what waits, together, until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            jobs, self._waiting = [job for job in self._waiting if not job.done.done()], []
            rows = [row for job in jobs for row in job.ids]
            for job in jobs:
                job.marks.started = time.monotonic()
            try:
                vectors = await loop.run_in_executor(self._thread, self._vectors, rows)
            except Exception as fault:  # the border to the libraries
                log.exception("embedding %d texts failed", len(rows))
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(translate(fault, "generate"))
                continue
            for job in jobs:
                mine, vectors = vectors[: len(job.ids)], vectors[len(job.ids) :]
                if not job.done.done():
                    job.done.set_result(mine)

    def _vectors(self, rows: list[list[int]]) -> list[list[float]]:
        """In the thread: batches of similar length."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        found: list[list[float]] = [[] for _ in rows]
        while order:
            most = max(1, self._batch_tokens // len(rows[order[0]]))
            batch, order = order[:most], order[most:]
            for index, vector in zip(batch, self._forward([rows[index] for index in batch]), strict=True):
                found[index] = vector
        return found

    def _forward(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        device = self._model.device
        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state.float()
            pooled = torch.cat([_pool(hidden, mask, way) for way in self._recipe.poolings], dim=-1)
            if self._recipe.normalise:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
        vectors: list[list[float]] = pooled.cpu().tolist()
        return vectors


def _pool(hidden: Any, mask: Any, way: str) -> Any:
    """``hidden`` ``[rows, tokens, size]`` and ``mask`` ``[rows, tokens]`` to ``[rows, size]``, in float32."""
    if way == "cls_token":
        return hidden[:, 0]
    lengths = mask.sum(dim=1)
    if way == "lasttoken":
        return hidden[range(len(hidden)), lengths - 1]
    inside = mask[:, :, None].float()
    if way == "max_tokens":
        return hidden.masked_fill(inside == 0, float("-inf")).max(dim=1).values
    total = (hidden * inside).sum(dim=1)
    return total / (lengths[:, None] if way == "mean_tokens" else lengths[:, None].sqrt())


def create(info: ModelInfo, options: EngineOptions, on_progress: Progress = no_progress) -> EmbeddingEngine:
    """Load the model. Blocks.

    Raises:
        InvalidConfig: ``extra`` holds an unknown setting.
        ModelUnsafe, CapabilityMissing, ModelLoadFailed, MemoryExceeded: see :func:`serve_app.engines.loading.load`.
    """
    from serve_app.engines.loading import load

    unknown = {name for name, _ in options.extra} - EXTRA
    if unknown:
        raise InvalidConfig(f"This engine has no setting {', '.join(sorted(unknown))}; it has {', '.join(EXTRA)}.")
    try:
        recipe = read_recipe(Path(info.path))
    except (OSError, ValueError, AttributeError, TypeError) as fault:
        log.exception("the recipe of %s cannot be read", info.id)
        raise ModelLoadFailed("The model's files do not say how its vectors are made.") from fault
    return EmbeddingEngine(load(info, options, on_progress, {Task.FEATURE_EXTRACTION: "AutoModel"}), recipe, options)
