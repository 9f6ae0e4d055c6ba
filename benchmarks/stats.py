"""Percentiles, and ratios of paired rounds with an interval. Standard library only; random numbers have a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev, stdev
from typing import Any

RESAMPLES = 10_000
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131
)  # fmt: skip
"""The 97.5 % points of Student's t for 1, 2, ... degrees of freedom; the last one serves for more."""
MEDIAN_OVER_MEAN = math.sqrt(math.pi / 2)
"""The standard error of the median of normal values, in that of their mean (a little less for few)."""


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t."""
    return STUDENT[min(freedom, len(STUDENT)) - 1]


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
    """A median and the bounds between which 95 % of the resampled medians lie.

    ``again`` holds wider ones: between them lies the median of another run of as many rounds, with 95 %. None: nobody
    has worked it out.
    """

    median: float
    low: float
    high: float
    rounds: int
    again: tuple[float, float] | None = None

    def crosses(self, target: float) -> bool:
        """Whether the interval leaves open on which side of ``target`` the value lies."""
        return self.low < target < self.high

    def to_json(self) -> dict[str, Any]:
        told = {"median": self.median, "low": self.low, "high": self.high, "rounds": self.rounds}
        return told | ({"again": list(self.again)} if self.again else {})


def bootstrap(values: Sequence[float], seed: int = 0, confidence: float = 0.95) -> Interval:
    """The median with a percentile-bootstrap interval (B. Efron, R. Tibshirani, "An Introduction to the Bootstrap",
    1993, chapter 13). With fewer than five values it is the least and the most of them: no resampling knows more.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    middle, low, high = median(values), min(values), max(values)
    if len(values) >= 5:
        rng = random.Random(seed)
        medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
        tail = (1 - confidence) / 2
        low, high = medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]
    expected = another(values)
    return Interval(middle, low, high, len(values), (min(low, expected[0]), max(high, expected[1])))


def another(values: Sequence[float]) -> tuple[float, float]:
    """Between what the median of another run of as many rounds lies, with 95 %.

    Of two runs each has its own error, so the interval of the first one's median holds the second's in some five of six
    rows at best. This is the prediction interval for a later mean (G. J. Hahn, W. Q. Meeker, "Statistical Intervals",
    1991, chapter 4), widened for medians, of logarithms where all values are positive: ratios and times are skewed.
    One value tells nothing of its spread: the bounds are that value.
    """
    if len(values) < 2:
        return values[0], values[0]
    positive = min(values) > 0
    scaled = [math.log(value) for value in values] if positive else list(values)
    half = student(len(values) - 1) * stdev(scaled) * math.sqrt(2 / len(values)) * MEDIAN_OVER_MEAN
    bounds = median(scaled) - half, median(scaled) + half
    return (math.exp(bounds[0]), math.exp(bounds[1])) if positive else bounds


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """The median of ours / theirs, round by round: what slows the machine down for a while slows both down.

    Raises:
        ValueError: not as many rounds of one as of the other, or none.
    """
    return bootstrap([mine / other for mine, other in zip(ours, theirs, strict=True)], seed)


@dataclass(frozen=True, slots=True)
class Runs:
    """One figure in several runs: of each the median, its standard error and the error's degrees of freedom.

    The runs have one error, the root of the mean of its squares: of a few rounds that lie close together by chance a
    weighted mean would make the truth.
    """

    medians: tuple[float, ...]
    errors: tuple[float, ...]
    freedoms: tuple[int, ...]

    @property
    def middle(self) -> float:
        return fmean(self.medians)

    @property
    def error(self) -> float:
        told = zip(self.errors, self.freedoms, strict=True)
        return math.sqrt(sum(freedom * error**2 for error, freedom in told) / sum(self.freedoms))

    @property
    def squares(self) -> float:
        """Of the medians' distances from the middle, in errors."""
        return sum((median - self.middle) ** 2 for median in self.medians) / self.error**2

    def bounds(self, factor: float, another: bool = False) -> tuple[float, float]:
        """Between what the middle lies with 95 %, or the median of another run, where runs lie ``factor`` times
        further apart than their errors tell."""
        count = len(self.medians)
        share = 1 / count + another
        half = student(sum(self.freedoms)) * factor * self.error * math.sqrt(share)
        return self.middle - half, self.middle + half


def scale_factor(rows: Sequence[Runs]) -> float:
    """How many times further apart several runs' medians lie than their standard errors tell; never below one.

    The root of chi-square per degree of freedom (R. T. Birge, "The Calculation of Errors by the Method of Least
    Squares", Phys. Rev. 40, 1932, 207), of all rows together: each has its own true value, all have one factor. A row
    of one run, or whose rounds were all alike, tells nothing of it.
    """
    told = [runs for runs in rows if len(runs.medians) > 1 and runs.error > 0]
    freedom = sum(len(runs.medians) - 1 for runs in told)
    return max(1.0, math.sqrt(sum(runs.squares for runs in told) / freedom)) if freedom else 1.0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of y over x by least squares; 0 for fewer than two points."""
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
