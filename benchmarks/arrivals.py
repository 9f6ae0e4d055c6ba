"""When requests are sent, for which model, and with what prompt: plans with a seed, the same in every run."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VOCABULARY = 8000
"""Words ``w0`` … of the tokenizers that the benchmark models have (benchmarks.models): one word is one token."""
DRAWN = VOCABULARY - 1
"""Prompts do without the last one, which llama.cpp's vocabulary lacks (benchmarks/peers/to_gguf.py)."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a plan. ``at``: seconds after the start, 0 in a closed loop, which has no times of its own."""

    at: float
    model: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """Random prompts of ``tokens`` words ± ``spread`` (a share of ``tokens``), uniformly, each after ``prefix``."""

    tokens: int = 128
    spread: float = 0.5
    prefix: str = ""

    def draw(self, rng: random.Random) -> str:
        least, most = (round(self.tokens * (1 + sign * self.spread)) for sign in (-1, 1))
        count = rng.randint(max(1, least), max(1, most))
        return self.prefix + " ".join(f"w{rng.randrange(1, DRAWN)}" for _ in range(count))


def gamma_times(rate: float, count: int, burstiness: float, seed: int) -> list[float]:
    """``count`` arrival times in seconds, the first at 0: gaps of a gamma distribution with a mean of 1 / ``rate``.

    ``burstiness`` is the distribution's shape, as in vLLM's `bench serve`: 1 is a Poisson process, less comes in
    bursts, more comes evenly, infinity is a metronome. An infinite rate sends everything at once.

    Raises:
        ValueError: the rate or the burstiness is not above 0.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError("rate and burstiness must be above 0")
    if rate == float("inf"):
        return [0.0] * count
    if burstiness == float("inf"):
        return [index / rate for index in range(count)]
    rng = random.Random(seed)
    gaps = (rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(max(count - 1, 0)))
    return list(itertools.accumulate(gaps, initial=0.0))[:count]


def zipf_models(models: Sequence[str], exponent: float, seed: int) -> Iterator[str]:
    """Independent draws for ever; the model at place r (from 1) has a weight of 1 / r ** exponent (0: all alike)."""
    rng = random.Random(seed)
    sums = list(itertools.accumulate(1 / rank**exponent for rank in range(1, len(models) + 1)))
    while True:
        yield models[min(bisect.bisect_left(sums, rng.random() * sums[-1]), len(models) - 1)]


def plan(
    models: Sequence[str],
    count: int,
    *,
    seed: int,
    max_tokens: int = 128,
    prompts: Prompts = Prompts(),
    rate: float | None = None,
    burstiness: float = 1.0,
    zipf: float = 0.0,
) -> list[Planned]:
    """``count`` requests; with ``rate`` (per second) an open loop, without it a closed one."""
    times = [0.0] * count if rate is None else gamma_times(rate, count, burstiness, seed)
    rng, names = random.Random(seed + 1), zipf_models(models, zipf, seed + 2)
    return [Planned(at, next(names), prompts.draw(rng), max_tokens) for at in times]
