"""The next token of one request: its own temperature, seed and penalties, whatever its neighbours ask for.

The order is vLLM's and ``generate``'s: log-probabilities of the model as it is, bias and penalties, what the grammar
allows, temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers.generation import logits_process as steps

from serve_app.domain.errors import GenerationFailed, InvalidInput
from serve_app.domain.generation import Options
from serve_app.engines.reply import Picked

COLDEST = 1e-5
"""A temperature below this is greedy: the division would leave the range of float32."""


LIKELIEST = 1024
"""Tokens that are looked at first for top-p."""
WORD = 2**64 - 1


class Constraint(Protocol):
    """What a reply may consist of, token by token (:mod:`serve_app.engines.structured`)."""

    def allowed(self, size: int) -> torch.Tensor:
        """Which of ``size`` tokens may come next, as booleans."""
        ...

    def allows(self, token: int) -> bool:
        """Whether this token may come next: cheaper than :meth:`allowed`."""
        ...

    def accept(self, token: int) -> None:
        """The token that came."""
        ...


class Sampler:
    """Chooses tokens for one request. What the request leaves open comes from the checkpoint's generation config.

    Temperature 0, or an open one where the checkpoint does not sample, takes the likeliest token. A seed makes the
    draws repeatable on the same machine and software with the same neighbours in the batch. Draw number ``n`` (from 0)
    depends on the seed and ``n`` alone, so a reply can be gone on with elsewhere. ``prompt_length`` counts what the
    decoder reads before the reply.

    Args:
        seed: of the draws; None for one that nobody knows.
        reply: tokens that the reply has already.
        ends: the tokens that end a reply.
        constraint: what the reply must look like; this sampler advances it.
        logprobs: takes a :class:`Picked` for every token, when the request asks for log-probabilities.
        device: where the logits are.
    """

    def __init__(
        self,
        options: Options,
        defaults: Any,
        ends: Sequence[int],
        prompt_length: int,
        constraint: Constraint | None = None,
        logprobs: list[Picked] | None = None,
        seed: int | None = None,
        reply: Sequence[int] = (),
        device: Any = "cpu",
    ) -> None:
        unasked = options.temperature is None
        temperature = _first(options.temperature, defaults.temperature, 1.0)
        self.greedy = temperature < COLDEST or (unasked and not defaults.do_sample)
        self._constraint = constraint
        self._top = options.logprobs
        self._told = logprobs if logprobs is not None else []
        self._penalties = _penalties(options, defaults, ends, prompt_length, constraint is not None, device)
        self._bias = _Bias(options)
        self._temperature = float(temperature)
        self._top_k = int(_first(options.top_k, defaults.top_k, 0))
        self._top_p = float(_first(options.top_p, defaults.top_p, 1.0))
        self._min_p = float(_first(options.min_p, defaults.min_p, 0.0))
        self._seed = secrets.randbits(63) if seed is None else seed
        self._draws = len(reply)
        self._generator = torch.Generator()
        for token in reply:
            self._bias.accept(token)

    @classmethod
    def of(cls, job: Any, defaults: Any, ends: Sequence[int], prompt_length: int, device: Any) -> Sampler:
        """The sampler of a :class:`serve_app.engines.worker.Job`."""
        request, told = job.request, job.stream.picked
        constraint = job.prompt.constraint
        return cls(request.options, defaults, ends, prompt_length, constraint, told, request.seed, job.tokens, device)

    @property
    def needs_ids(self) -> bool:
        """Whether :meth:`pick` looks at the tokens so far."""
        return bool(self._penalties)

    @property
    def plain(self) -> bool:
        """Whether :meth:`pick` does no more than take the likeliest token, so that a batch may do it in one call."""
        return (
            self.greedy
            and not self._penalties
            and not self._bias.acts
            and self._constraint is None
            and self._top is None
        )

    def pick(self, logits: torch.Tensor, ids: Sequence[int]) -> int:
        """The next token, which must then be used: the sampler remembers it.

        Args:
            logits: ``[vocabulary]``, of the last position.
            ids: what the decoder has read so far; may be empty unless :attr:`needs_ids`.

        Raises:
            InvalidInput: ``logit_bias`` names a token that there is not.
            GenerationFailed: the grammar leaves no token, or has become too complex.
        """
        model = logits.float()
        scores = self._processed(model, ids)
        token = self._choose(scores, model)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._bias.accept(token)
        self._draws += 1
        if self._top is not None:
            self._told.append(_told(model, token, self._top))
        return token

    def _processed(self, model: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        scores = self._bias.apply(model)
        if self._penalties:
            so_far = torch.tensor([list(ids)], device=scores.device)
            for penalty in self._penalties:
                scores = penalty(so_far, scores[None])[0]
        return scores

    def _choose(self, scores: torch.Tensor, model: torch.Tensor) -> int:
        if self.greedy and self._constraint is not None:
            likeliest = int(scores.argmax())
            if self._constraint.allows(likeliest):
                return likeliest
        scores = self._constrained(scores, model)
        if self.greedy:
            return int(scores.argmax())
        weights, tokens = narrowed(scores / self._temperature, self._top_k, self._top_p, self._min_p)
        self._generator.manual_seed(_draw_seed(self._seed, self._draws))
        place = int(torch.multinomial(weights.cpu(), 1, generator=self._generator))
        return place if tokens is None else int(tokens[place])

    def _constrained(self, scores: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        if self._constraint is None:
            return scores
        allowed = self._constraint.allowed(scores.shape[-1]).to(scores.device)
        if not bool(allowed.any()):
            raise GenerationFailed("The form that was asked for leaves the model no next token.")
        scores = scores.masked_fill(~allowed, -torch.inf)
        # A checkpoint may forbid by its own settings all that the grammar leaves; then the grammar counts.
        return scores if bool(scores.isfinite().any()) else model.masked_fill(~allowed, -torch.inf)


def _draw_seed(seed: int, number: int) -> int:
    """32 bits (torch's generator takes no more) for one draw: SplitMix64's output function of its ``number``-th state.

    https://prng.di.unimi.it/splitmix64.c
    """
    state = (seed + (number + 1) * 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return (state ^ (state >> 31)) >> 32


class _Bias:
    """``logit_bias``, presence and frequency penalties, by OpenAI's formula: what is added does not depend on the
    prompt, only on how often the reply holds the token already.

    logit -= count * frequency_penalty + (count > 0) * presence_penalty
    """

    def __init__(self, options: Options) -> None:
        self._fixed: Mapping[int, float] = options.logit_bias
        self._presence = options.presence_penalty or 0.0
        self._frequency = options.frequency_penalty or 0.0
        self._counts: Counter[int] = Counter()

    @property
    def acts(self) -> bool:
        return bool(self._fixed or self._presence or self._frequency)

    def accept(self, token: int) -> None:
        if self._presence or self._frequency:
            self._counts[token] += 1

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        changes = dict(self._fixed)
        for token, count in self._counts.items():
            changes[token] = changes.get(token, 0.0) - count * self._frequency - self._presence
        if not changes:
            return scores
        if max(changes) >= scores.shape[-1]:
            message = f"logitBias names the token {max(changes)}; the model has {scores.shape[-1]}."
            raise InvalidInput(message, details={"param": "logitBias"})
        places = torch.tensor(list(changes), device=scores.device)
        return scores.index_add(0, places, torch.tensor(list(changes.values()), device=scores.device))


def _told(model: torch.Tensor, token: int, most: int) -> Picked:
    logprobs = torch.log_softmax(model, dim=-1)
    values, places = logprobs.topk(min(most, logprobs.shape[-1]))
    return Picked(token, float(logprobs[token]), tuple(zip(places.tolist(), values.tolist(), strict=True)))


def narrowed(scores: torch.Tensor, top_k: int, top_p: float, min_p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a token is drawn from: weights, and the tokens that they belong to (None: all, in their order).

    Top-k, top-p and min-p in the order and with the meaning that they have in ``generate``. Sorting a vocabulary of
    150,000 takes 30 ms; its few likeliest tokens nearly always hold what is looked for, and take less than one.

    Args:
        scores: ``[vocabulary]``, the temperature already in them.
    """
    whole = torch.softmax(scores, dim=-1)
    if not top_k and top_p >= 1.0:
        return (whole.where(whole >= min_p * whole.max(), 0.0) if min_p else whole), None
    weights, tokens = whole.topk(min(top_k or LIKELIEST, whole.shape[-1]))
    if not top_k and float(weights.sum()) < top_p:
        weights, tokens = whole.sort(descending=True)
    if top_k:
        weights = weights / weights.sum()
    if top_p < 1.0:
        before = weights.cumsum(-1) - weights
        weights = weights.where(before < top_p, 0.0)  # the first is always kept
    return weights.where(weights >= min_p * weights[0], 0.0), tokens


def _penalties(
    options: Options, defaults: Any, ends: Sequence[int], prompt_length: int, constrained: bool, device: Any
) -> list[Callable[..., Any]]:
    """What looks at the tokens so far. A grammar alone decides when its reply ends."""
    repetition = _first(options.repetition_penalty, defaults.repetition_penalty, 1.0)
    least = 0 if constrained else _first(options.min_tokens, defaults.min_new_tokens, 0)
    held_back = [*ends, *(token for token in options.stop_token_ids if token not in ends)]
    found: list[Callable[..., Any]] = []
    if repetition != 1.0:
        found.append(steps.RepetitionPenaltyLogitsProcessor(float(repetition)))
    if defaults.no_repeat_ngram_size:
        found.append(steps.NoRepeatNGramLogitsProcessor(int(defaults.no_repeat_ngram_size)))
    if least and held_back:
        found.append(steps.MinNewTokensLengthLogitsProcessor(prompt_length, int(least), held_back, device))
    if defaults.forced_bos_token_id is not None and not constrained:
        found.append(steps.ForcedBOSTokenLogitsProcessor(int(defaults.forced_bos_token_id)))
    if defaults.suppress_tokens:
        found.append(steps.SuppressTokensLogitsProcessor(defaults.suppress_tokens, device))
    return found


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
