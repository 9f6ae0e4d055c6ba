"""The engine for Hugging Face models: transformers in a thread of its own.

Options in :attr:`EngineOptions.extra`: ``use_gpu`` (false), ``cuda_graphs`` (true; for what runs on a GPU:
:mod:`serve_app.engines.graphs`), ``kv_tokens`` (see :mod:`serve_app.engines.memory`), ``prompt_timeout_s`` (30:
templates and tokenizing), ``quantize`` (none, or "int8": see :func:`serve_app.engines.loading.quantize`), ``stall_s``
(600: the longest step that is not a hang), ``batch_tokens`` (tokens of prompts in one pass at most; what suits the
device and the model, see :mod:`serve_app.engines.pace`).

Usage: ``prompt_tokens`` are all ids that the model reads, placeholders of images included; ``completion_tokens`` are
all that it made, the token that ended the reply included. A continued reply's own prompt and new tokens only.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.errors import (
    InvalidConfig,
    InvalidInput,
    ModelLoadFailed,
    ModelUnsafe,
    ProviderUnavailable,
    RotundaError,
)
from serve_app.domain.generation import Accepted, Finish, GenerationRequest, Item, Message, Usage
from serve_app.engines.base import Counters, EngineOptions, Progress, no_progress
from serve_app.engines.faults import translate
from serve_app.engines.ledger import Ledger, check_room
from serve_app.engines.memory import context_limit, extra, kv_tokens
from serve_app.engines.pace import MIN_CHUNK
from serve_app.engines.prompt import Prompt, Prompter
from serve_app.engines.reply import ReplyStream
from serve_app.engines.text import Decode, Detokenizer, Step, guarded_step, window_step
from serve_app.engines.worker import Decoder, Job, Worker

log = logging.getLogger(__name__)

PROMPT_THREADS = 2
EXTRA = frozenset({"use_gpu", "cuda_graphs", "kv_tokens", "prompt_timeout_s", "quantize", "stall_s", "batch_tokens"})
TEMPLATE_CPU_S = 0.1
"""Processor time that the chat template may take for one short message."""
TEMPLATE_WAIT_S = 20.0
CONTINUED_IDS = 8
"""Ids of a continued text that its continuation is decoded after."""
Read = tuple[Prompt, ReplyStream]
"""A prompt, and what reads its reply."""


class TransformersEngine:
    """Implements :class:`serve_app.engines.base.Engine`. Make it with :func:`create`."""

    def __init__(
        self,
        info: ModelInfo,
        options: EngineOptions,
        prompter: Prompter,
        decoder: Decoder,
        detokenizer: Callable[[Sequence[int]], Detokenizer],
        description: str,
    ) -> None:
        self._info = info
        self._options = options
        self._prompter = prompter
        self._detokenizer = detokenizer
        self._description = description
        self._prompt_timeout_s = float(extra(options, "prompt_timeout_s", 30.0))
        self._stuck_prompts = 0
        self._ledger = Ledger()
        self._prompts = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="prompt")
        stall_s = float(extra(options, "stall_s", 600.0))
        self._worker = Worker(decoder, self._ledger, options.max_concurrency, kv_tokens(info, options), stall_s)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def description(self) -> str:
        return self._description

    def __repr__(self) -> str:
        return f"TransformersEngine({self._info.id!r}, {self._worker!r}, {self._ledger.snapshot()})"

    def counters(self) -> Counters:
        return self._ledger.snapshot()

    def check_health(self) -> None:
        self._worker.check_health()
        if self._stuck_prompts >= PROMPT_THREADS:
            raise ProviderUnavailable("The model's chat template hangs. Its replica will be replaced.")

    async def close(self) -> None:
        await asyncio.to_thread(self._worker.close)
        self._prompts.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Item]:
        """See :class:`serve_app.engines.base.Engine`."""
        self._ledger.enter()
        job = await self._enter(request, time.monotonic())
        try:
            yield Accepted(len(job.prompt.ids), job.prompt.dropped, self._info.revision or None)
            if job.over is not None:
                yield Finish(job.over, Usage(len(job.prompt.ids), 0), stop=job.matched)
                return
            item: Any = None
            while not isinstance(item, Finish):
                item = await job.items.get()
                if isinstance(item, RotundaError):
                    raise item
                yield item
        finally:
            self._worker.cancel(job)

    async def _enter(self, request: GenerationRequest, arrived: float) -> Job:
        """Make the prompt and put the request in the line; whoever fails here is counted as waiting until it does."""
        try:
            self.check_health()
            check_room(self._ledger.snapshot(), self._options)
            if request.continuation is not None:
                request = replace(request, continuation=request.continuation.read_by(self._info.revision))
            prompt, stream = await self._prompt(request)
            job = Job(request, prompt, stream, asyncio.get_running_loop(), arrived)
            if job.over is None:
                self._worker.submit(job)
            else:
                self._ledger.leave("waiting", "finished")
        except BaseException as fault:
            self._ledger.leave("waiting", "failed" if isinstance(fault, Exception) else "cancelled")
            raise
        return job

    async def _prompt(self, request: GenerationRequest) -> Read:
        task = self._prompts.submit(self._build, request)
        making = asyncio.wrap_future(task)
        making.add_done_callback(_retrieve)
        done, _ = await asyncio.wait({making}, timeout=self._prompt_timeout_s)
        if done:
            return making.result()
        if task.cancel():
            raise ProviderUnavailable("The model has too many prompts to read. Try again.")
        self._stuck_prompts += 1
        making.add_done_callback(self._unstick)
        raise InvalidInput("The prompt takes too long to make. Shorten the conversation.")

    def _unstick(self, making: asyncio.Future[Read]) -> None:
        self._stuck_prompts -= 1

    def _build(self, request: GenerationRequest) -> Read:
        try:
            prompt = self._prompter.build(request)
            go_on = request.continue_final or (request.continuation and request.continuation.beginning)
            stream = self._prompter.stream(
                request, prompt, self._detokenizer(prompt.ids[-CONTINUED_IDS:] if go_on else ())
            )
            stream.replay(prompt.begun)
            return prompt, stream
        except Exception as fault:  # the border to templates, tokenizers and processors
            if not isinstance(fault, RotundaError):
                log.exception("the prompt of %s failed", request.request_id)
            raise translate(fault, "prompt") from None


def create(info: ModelInfo, options: EngineOptions, on_progress: Progress = no_progress) -> TransformersEngine:
    """Load the model, try it, and start its thread. Blocks.

    Raises:
        InvalidConfig: ``extra`` holds an unknown setting.
        ModelUnsafe: the chat template is too slow.
        ModelUnsafe, CapabilityMissing, ModelLoadFailed, MemoryExceeded: see :func:`serve_app.engines.loading.load`.
    """
    from serve_app.engines import decoding
    from serve_app.engines.choice import choose
    from serve_app.engines.loading import load
    from serve_app.engines.structured import Grammars
    from serve_app.engines.vocabulary import Vocabulary

    unknown = {name for name, _ in options.extra} - EXTRA
    if unknown:
        raise InvalidConfig(
            f"This engine has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(EXTRA))}."
        )
    batch_tokens = extra(options, "batch_tokens", None)
    if batch_tokens is not None and not (isinstance(batch_tokens, int) and batch_tokens >= MIN_CHUNK):
        raise InvalidConfig(f"batch_tokens is a whole number from {MIN_CHUNK} on.")
    loaded = load(info, options, on_progress)
    info = loaded.info
    size = int(loaded.model.get_input_embeddings().weight.shape[0])
    limit, budget = context_limit(info, options), kv_tokens(info, options)
    prompter = Prompter(
        loaded.tokenizer,
        loaded.processor,
        limit or budget,
        _max_tokens(loaded, options),
        bool(loaded.model.config.is_encoder_decoder),
        Grammars(Vocabulary(loaded.tokenizer, size, decoding.end_tokens(loaded, size))),
    )
    on_progress("warmup", 0.0)
    check_template(prompter)
    try:
        ids = _canary(loaded.tokenizer, loaded.model)
        graphs = bool(extra(options, "cuda_graphs", True))
        decoder = choose(loaded, ids, options.max_concurrency, limit, budget, graphs, batch_tokens)
    except Exception as fault:  # the border to the libraries
        log.exception("trying %s failed", info.id)
        raise translate(fault, "load") from None
    on_progress("warmup", 1.0)
    parts = [
        f"transformers on {loaded.device}",
        loaded.dtype if loaded.dtype == info.dtype else f"{loaded.dtype} (the checkpoint has {info.dtype})",
        *([f"{loaded.quantized} weights"] if loaded.quantized else []),
        f"{loaded.attention} attention",
        decoder.description,
        prompter.style,
    ]
    return TransformersEngine(info, options, prompter, decoder, detokenizers(loaded.tokenizer), ", ".join(parts))


def check_template(prompter: Prompter) -> None:
    """Refuse a chat template that would keep a replica busy: the best of three short prompts counts.

    A thread of its own renders, since nothing can stop a template; the process of a refused model ends anyway.

    Raises:
        ModelUnsafe: it takes more than :data:`TEMPLATE_CPU_S`, or does not end.
    """
    times: list[float] = []
    given_up = threading.Event()

    def render() -> None:
        while len(times) < 3 and not given_up.is_set():
            begun = time.thread_time()
            # A template may refuse this conversation; requests are told then.
            with suppress(Exception):
                prompter.build(GenerationRequest("trial", "", (Message.of("user", "Hello"),)))
            times.append(time.thread_time() - begun)

    thread = threading.Thread(target=render, name="template", daemon=True)
    thread.start()
    thread.join(TEMPLATE_WAIT_S)
    given_up.set()
    if not times or min(times) > TEMPLATE_CPU_S:
        raise ModelUnsafe(
            f"The model's chat template takes more than {TEMPLATE_CPU_S * 1000:g} ms for a short message."
        )


def _max_tokens(loaded: Any, options: EngineOptions) -> int:
    said = loaded.model.generation_config.max_new_tokens
    return said if isinstance(said, int) and said > 0 else options.max_tokens


def _canary(tokenizer: Any, model: Any) -> list[int]:
    ids: list[int] = tokenizer("Hello, how are you?")["input_ids"]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [token for token in ids if token < vocabulary]
    if not ids:
        raise ModelLoadFailed("The model's tokenizer knows no words.")
    return ids


def _retrieve(making: asyncio.Future[Read]) -> None:
    """Look at the outcome, so that asyncio does not complain when nobody waits for it any more."""
    if not making.cancelled():
        making.exception()


def detokenizers(tokenizer: Any) -> Callable[[Sequence[int]], Detokenizer]:
    """A maker of detokenizers: the fast tokenizer's own stream, or windows over ``decode`` for the others.

    It takes the ids that go before the reply when that continues a text: a tokenizer that leaves out the blank before
    a first word must not do so there.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def make(before: Sequence[int] = ()) -> Detokenizer:
        step = _stepper(tokenizer, decode)
        for token in before:
            step(token)
        known = len(decode(before)) if before else 0
        return Detokenizer(step, lambda ids: decode((*before, *ids))[known:])

    return make


def _stepper(tokenizer: Any, decode: Decode) -> Step:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return window_step(decode)
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)

    def step(token: int) -> str | None:
        text: str | None = stream.step(backend, token)
        return text

    return guarded_step(step, decode)
