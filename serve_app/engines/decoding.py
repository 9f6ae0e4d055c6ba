"""Decoding with a transformers model: one forward pass for each request, cached keys and values.

The steps are those of ``generate`` (``prepare_inputs_for_generation``, forward, update of the cache and masks), so that
what works there works here; but one token at a time, with the sampling of each request, and free to stop anywhere.
A canary at load compares a few tokens with those of the whole text read anew for each; where they differ, the cache is
given up: slower, and right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from serve_app.domain.errors import InvalidInput
from serve_app.engines.loading import Loaded
from serve_app.engines.sampling import Sampler
from serve_app.engines.worker import Job

CANARY_TOKENS = 4
CANARY_TOLERANCE = 0.05
"""Of the logits' standard deviation."""


class _State:
    """What a request keeps between steps: the sampler and the arguments of the next forward pass."""

    def __init__(self, sampler: Sampler, arguments: dict[str, Any]) -> None:
        self.sampler = sampler
        self.arguments = arguments


class SoloDecoder:
    """Implements :class:`serve_app.engines.worker.Decoder` for decoder-only and encoder-decoder models.

    ``reason``: why the model gets no better one (:mod:`serve_app.engines.choice`).
    """

    def __init__(self, loaded: Loaded) -> None:
        self._model = loaded.model
        self._config = loaded.model.config
        self._device = loaded.model.device
        self._vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
        self._defaults = loaded.model.generation_config
        self._ends = end_tokens(loaded, self._vocabulary)
        takes = inspect.signature(loaded.model.forward).parameters
        self._prefill_extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cached = True
        self.reason: str | None = None
        # Qwen-VL and its kin keep the positions of the last prompt's images on the model itself.
        self.places = 1 if any(hasattr(module, "rope_deltas") for module in loaded.model.modules()) else None

    @property
    def description(self) -> str:
        way = "one request at a time" if self.places == 1 else "a pass per request"
        why = f" ({self.reason})" if self.reason else ""
        return f"{way}{'' if self.cached else ', no cache'}{why}"

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._ends

    def ends(self, token: int) -> bool:
        return token in self._ends

    def release(self, job: Job) -> None:
        job.state = None

    def start(self, jobs: Sequence[Job]) -> list[int | Exception | None]:
        """See :class:`Decoder`: the whole prompt of the oldest."""
        first: int | Exception | None
        try:
            with torch.inference_mode():
                first = self._read(jobs[0])
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            first = fault
        return [first, *[None] * (len(jobs) - 1)]

    def _read(self, job: Job) -> int:
        self.check_ids([*job.prompt.ids, *job.tokens])
        tokens, arguments = self._first_arguments(job.prompt.ids, job.prompt.inputs, job.tokens)
        sampler = self.sampler(job, tokens.shape[1] - len(job.tokens))
        logits, arguments = self._forward(tokens, arguments, first=True)
        job.state = _State(sampler, arguments)
        return sampler.pick(logits, tokens[0].tolist())

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ``InvalidInput`` for ids that the model has no embedding for."""
        if max(ids) >= self._vocabulary:
            raise InvalidInput("The prompt holds a token that the model does not know.")

    def sampler(self, job: Job, read: int) -> Sampler:
        """The sampler of a job whose decoder has ``read`` tokens before the reply."""
        return Sampler.of(job, self._defaults, tuple(self._ends), read)

    def advance(self, jobs: Sequence[Job]) -> list[int | Exception]:
        """See :class:`Decoder`; one forward pass for each job in turn."""
        with torch.inference_mode():
            return [self._next(job) for job in jobs]

    def _next(self, job: Job) -> int | Exception:
        try:
            state: _State = job.state
            whole = self._decoder_ids(job) if state.sampler.needs_ids or not self.cached else []
            tokens = torch.tensor([job.tokens[-1:] if self.cached else whole], device=self._device)
            logits, state.arguments = self._forward(tokens, state.arguments, first=not self.cached)
            return state.sampler.pick(logits, whole)
        except Exception as fault:  # the border to the libraries: one job's fault is not the others'
            return fault

    def _decoder_ids(self, job: Job) -> list[int]:
        begin = [self._start_token()] if self._config.is_encoder_decoder else list(job.prompt.ids)
        return [*begin, *job.tokens]

    def _first_tokens(self, ids: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        """What the decoder reads first: the prompt, or the start token where an encoder reads the prompt; then what
        there is of the reply."""
        first = [self._start_token()] if self._config.is_encoder_decoder else list(ids)
        return torch.tensor([[*first, *reply]], device=self._device)

    def _first_arguments(
        self, ids: Sequence[int], inputs: Any, reply: Sequence[int] = ()
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        more = [] if self._config.is_encoder_decoder else list(reply)
        tokens = torch.tensor([[*ids, *more]], device=self._device)
        arguments: dict[str, Any] = {"use_cache": self.cached, "attention_mask": torch.ones_like(tokens)}
        for name, value in inputs.items():
            arguments[name] = value.to(self._device)
            if more and value.shape == (1, len(ids)):  # a kind for each token; that of text is 0
                arguments[name] = torch.nn.functional.pad(arguments[name], (0, len(more)))
            if value.is_floating_point():
                arguments[name] = arguments[name].to(self._model.dtype)
        if self._config.is_encoder_decoder:
            encoder = self._model.get_encoder()
            arguments["encoder_outputs"] = encoder(tokens, attention_mask=arguments["attention_mask"], return_dict=True)
        return self._first_tokens(ids, reply), arguments

    def _start_token(self) -> int:
        token = self._defaults.decoder_start_token_id
        return int(token if token is not None else self._config.decoder_start_token_id or 0)

    def _forward(
        self, tokens: torch.Tensor, arguments: dict[str, Any], first: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The logits ``[vocabulary]`` of the last position, and the arguments of the next pass."""
        prepared = self._model.prepare_inputs_for_generation(
            tokens, is_first_iteration=first, next_sequence_length=None if first else 1, **arguments
        )
        outputs = self._model(**(prepared | (self._prefill_extra if first else {})), return_dict=True)
        following = self._model._update_model_kwargs_for_generation(
            outputs, arguments, is_encoder_decoder=self._config.is_encoder_decoder
        )
        return outputs.logits[0, -1], following

    def check(self, ids: Sequence[int]) -> bool:
        """Whether a few likeliest tokens come out alike with the cache and without; also warms the model up."""
        with torch.inference_mode():
            tokens, arguments = self._first_arguments(ids, {})
            chosen: list[int] = []
            for step in range(CANARY_TOKENS):
                logits, arguments = self._forward(tokens, arguments, first=step == 0)
                reference = self.reread(ids, chosen).float()
                chosen.append(int(logits.argmax()))
                # Two ways of rounding may choose either of two tokens that are as good as equally likely.
                if reference.max() - reference[chosen[-1]] > CANARY_TOLERANCE * reference.std():
                    return False
                tokens = torch.tensor([chosen[-1:]], device=self._device)
        return True

    def reread(self, ids: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        """The logits after prompt and reply, from one pass over all of it that fills no cache."""
        with torch.inference_mode():
            return self._reread(ids, reply)

    def _reread(self, ids: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
        tokens, arguments = self._first_arguments(ids, {})
        following = torch.tensor([list(reply)], dtype=tokens.dtype, device=self._device)
        arguments["use_cache"] = False
        if not self._config.is_encoder_decoder:
            mask = arguments["attention_mask"]
            arguments["attention_mask"] = torch.cat([mask, torch.ones_like(following)], dim=1)
        logits, _ = self._forward(torch.cat([tokens, following], dim=1), arguments, first=True)
        return logits


def end_tokens(loaded: Loaded, vocabulary: int) -> frozenset[int]:
    """The tokens that end a reply: those of the generation config, and the tokenizer's.

    The tokenizer's are added because many chat models name their end of turn only there. Whatever is no token of the
    vocabulary (None, -1, a number beyond it) is left out.
    """
    said = loaded.model.generation_config.eos_token_id
    listed = said if isinstance(said, (list, tuple)) else [said]
    found = {token for token in (*listed, loaded.tokenizer.eos_token_id) if type(token) is int}
    return frozenset(token for token in found if 0 <= token < vocabulary)
