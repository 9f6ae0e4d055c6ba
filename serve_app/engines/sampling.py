"""The next token of one request: its own temperature, seed and penalties, whatever its neighbours ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import logits_process as steps

from serve_app.domain.generation import Options

COLDEST = 1e-5
"""A temperature below this is greedy: the division would leave the range of float32."""


class Sampler:
    """Chooses tokens for one request. What the request leaves open comes from the checkpoint's generation config.

    Temperature 0, or an open one where the checkpoint does not sample, takes the likeliest token. A seed makes the
    draws repeatable on the same machine and software with the same neighbours in the batch. ``prompt_length`` counts
    what the decoder reads before its first own token.
    """

    def __init__(self, options: Options, defaults: Any, ends: Sequence[int], prompt_length: int) -> None:
        unasked = options.temperature is None
        temperature = _first(options.temperature, defaults.temperature, 1.0)
        self.greedy = temperature < COLDEST or (unasked and not defaults.do_sample)
        self._penalties = _penalties(defaults, ends, prompt_length)
        self._warpers = [] if self.greedy else _warpers(options, defaults)
        self._generator = torch.Generator()
        if options.seed is not None:
            self._generator.manual_seed(options.seed)
        else:
            self._generator.seed()

    @property
    def needs_ids(self) -> bool:
        """Whether :meth:`pick` looks at the tokens so far."""
        return bool(self._penalties)

    def pick(self, logits: torch.Tensor, ids: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: ``[vocabulary]``, of the last position.
            ids: what the decoder has read so far; may be empty unless :attr:`needs_ids`.
        """
        scores = logits.float()[None]
        if self._penalties:
            so_far = torch.tensor([list(ids)], device=scores.device)
            for penalty in self._penalties:
                scores = penalty(so_far, scores)
        if self.greedy:
            return int(scores.argmax())
        for warper in self._warpers:
            scores = warper(None, scores)
        probabilities = torch.softmax(scores[0], dim=-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _warpers(options: Options, defaults: Any) -> list[Callable[..., Any]]:
    """In the order in which ``generate`` applies them."""
    temperature = _first(options.temperature, defaults.temperature, 1.0)
    top_k = _first(options.top_k, defaults.top_k, 0)
    top_p = _first(options.top_p, defaults.top_p, 1.0)
    found: list[Callable[..., Any]] = []
    if temperature != 1.0:
        found.append(steps.TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(steps.TopKLogitsWarper(int(top_k)))
    if top_p < 1.0:
        found.append(steps.TopPLogitsWarper(float(top_p)))
    if defaults.min_p:
        found.append(steps.MinPLogitsWarper(float(defaults.min_p)))
    return found


def _penalties(defaults: Any, ends: Sequence[int], prompt_length: int) -> list[Callable[..., Any]]:
    found: list[Callable[..., Any]] = []
    if defaults.repetition_penalty and defaults.repetition_penalty != 1.0:
        found.append(steps.RepetitionPenaltyLogitsProcessor(float(defaults.repetition_penalty)))
    if defaults.no_repeat_ngram_size:
        found.append(steps.NoRepeatNGramLogitsProcessor(int(defaults.no_repeat_ngram_size)))
    if defaults.min_new_tokens and ends:
        found.append(steps.MinNewTokensLengthLogitsProcessor(prompt_length, int(defaults.min_new_tokens), list(ends)))
    if defaults.forced_bos_token_id is not None:
        found.append(steps.ForcedBOSTokenLogitsProcessor(int(defaults.forced_bos_token_id)))
    if defaults.suppress_tokens:
        found.append(steps.SuppressTokensLogitsProcessor(defaults.suppress_tokens))
    return found


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
