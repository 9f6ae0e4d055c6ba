"""Percentiles, and ratios of paired rounds with an interval. Standard library only; random numbers have a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Any

RESAMPLES = 10_000


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest values (numpy's default); NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float], name: str, percents: Sequence[float]) -> dict[str, float | None]:
    """``mean_{name}``, ``median_{name}``, ``std_{name}`` and ``p{percent}_{name}``; None where there are no values."""
    if not values:
        return {
            f"{kind}_{name}": None for kind in ("mean", "median", "std", *(f"p{percent:g}" for percent in percents))
        }
    found: dict[str, float | None] = {
        f"mean_{name}": fmean(values),
        f"median_{name}": median(values),
        f"std_{name}": pstdev(values),
    }
    return found | {f"p{percent:g}_{name}": percentile(values, percent) for percent in percents}


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the bounds between which 95 % of the resampled medians lie."""

    median: float
    low: float
    high: float
    rounds: int

    def crosses(self, target: float) -> bool:
        """Whether the interval leaves open on which side of ``target`` the value lies."""
        return self.low < target < self.high

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "low": self.low, "high": self.high, "rounds": self.rounds}


def bootstrap(values: Sequence[float], seed: int = 0, confidence: float = 0.95) -> Interval:
    """The median with a percentile-bootstrap interval (B. Efron, R. Tibshirani, "An Introduction to the Bootstrap",
    1993, chapter 13). With fewer than five values it is the least and the most of them: no resampling knows more.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    middle = median(values)
    if len(values) < 5:
        return Interval(middle, min(values), max(values), len(values))
    rng = random.Random(seed)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    return Interval(middle, medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1], len(values))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """The median of ours / theirs, round by round: what slows the machine down for a while slows both down.

    Raises:
        ValueError: not as many rounds of one as of the other, or none.
    """
    return bootstrap([mine / other for mine, other in zip(ours, theirs, strict=True)], seed)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of y over x by least squares; 0 for fewer than two points."""
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
