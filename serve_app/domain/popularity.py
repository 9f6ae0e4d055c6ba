"""How likely each model is to be asked for next, learned from the arrivals alone.

For each of several half-lives (counted in arrivals, so a quiet night forgets nothing) a model has an exponentially
decayed count, as in LRFU (D. Lee et al., IEEE Trans. Computers 50(12), 2001). Divided by the decayed count of all
arrivals it is an estimate of the chance that the next arrival is for this model: short half-lives follow bursts and
resemble LRU, the endless one is LFU. The chance given out is their linear mixture. Its weights are learned on-line by
stochastic expectation maximisation (O. Cappé, E. Moulines, J. R. Stat. Soc. B 71(3), 2009): after each arrival every
estimate is credited with the part of the mixture's prediction that was its own. So no half-life has to be chosen:
steady popularity moves the weight to the long ones, sessions and trends to the short ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

HALF_LIVES = (2.0, 16.0, 128.0, 1024.0, 8192.0)
"""In arrivals; one more estimate, the plain count, never forgets."""
STEP = 0.005
"""Weight of one arrival in the learning: the mixture follows changes within some hundred arrivals."""
FLOOR = 0.002
"""No weight falls below this, so that an estimate that becomes right again is heard again."""
_DECAYS = (*(0.5 ** (1 / half_life) for half_life in HALF_LIVES), 1.0)


class Popularity:
    """Decayed arrival counts of every model that was ever asked for, and the weights of their mixture."""

    __slots__ = ("_arrivals", "_counts", "_totals", "_weights")

    def __init__(self) -> None:
        self._arrivals = 0
        self._counts: dict[str, tuple[int, tuple[float, ...]]] = {}
        """Per model: the number of its last arrival and its counts right after that."""
        self._totals = (0.0,) * len(_DECAYS)
        self._weights = (1.0 / len(_DECAYS),) * len(_DECAYS)

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.2f}" for weight in self._weights)
        return f"Popularity({self._arrivals} arrivals of {len(self._counts)} models, weights {weights})"

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the mixture, shortest half-life first; they sum to 1."""
        return self._weights

    def arrived(self, model: str, times: int = 1) -> None:
        """Count ``times`` arrivals for ``model``; more than 64 at once teach no more than 64."""
        for _ in range(min(times, 64)):
            self._arrive(model)

    def chance(self, model: str) -> float:
        """The estimated probability, in [0, 1], that the next arrival is for ``model``."""
        known = self._counts.get(model)
        if known is None or not self._arrivals:
            return 0.0
        age = self._arrivals - known[0]
        return math.fsum(
            weight * count * math.pow(decay, age) / total
            for weight, count, decay, total in zip(self._weights, known[1], _DECAYS, self._totals, strict=True)
        )

    def forget(self, model: str) -> None:
        """Drop what is known of a model that exists no more."""
        self._counts.pop(model, None)

    def _arrive(self, model: str) -> None:
        number, counts = self._counts.get(model, (self._arrivals, ()))
        age = self._arrivals - number
        present = tuple(count * decay**age for count, decay in zip(counts, _DECAYS, strict=False))
        if present:
            self._learn([count / total for count, total in zip(present, self._totals, strict=True)])
        self._arrivals += 1
        self._totals = tuple(total * decay + 1.0 for total, decay in zip(self._totals, _DECAYS, strict=True))
        self._counts[model] = (self._arrivals, tuple(self._stepped(present)))

    @staticmethod
    def _stepped(present: tuple[float, ...]) -> Iterator[float]:
        """The counts after one more arrival; one that is its model's first finds nothing to decay."""
        for index, decay in enumerate(_DECAYS):
            yield (present[index] * decay if present else 0.0) + 1.0

    def _learn(self, predicted: list[float]) -> None:
        parts = [weight * chance for weight, chance in zip(self._weights, predicted, strict=True)]
        whole = sum(parts)
        if whole <= 0.0:
            return
        moved = [
            max(FLOOR, (1 - STEP) * weight + STEP * part / whole)
            for weight, part in zip(self._weights, parts, strict=True)
        ]
        total = sum(moved)
        self._weights = tuple(weight / total for weight in moved)
