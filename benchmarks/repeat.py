"""Whether a second run of the same scenarios says what the first one said.

``python -m benchmarks.repeat SECOND [FIRST]``: folders of results (FIRST is ``benchmarks/results``). For each row that
both have: does the second run's median lie where the first one expected it, and within the 95 % interval of the first
one's own median? Of two runs each has its error, so the latter holds in some five of six rows at best.

Rounds that follow each other know nothing of what differs from one hour to another, so what is expected of another
run is wider by a factor for each scenario (:func:`factors`), out of the runs that are kept beside the published one,
without the one that is judged. How fast the machine was before each run (benchmarks.machine.speed) is told where both
runs have it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.found import REPEATS, Found, number, read
from benchmarks.protocol import RESULTS
from benchmarks.stats import scale_factor, student


def factors(runs: Sequence[Sequence[Found]]) -> dict[str, float]:
    """By scenario: how many times further apart its runs' medians lie than the rounds of each run tell.

    Only of scenarios that several of the runs have, and only of full runs; never below one.
    """
    rows: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for result in (result for run in runs for result in run if not result["quick"]):
        for row in result["rows"]:
            rows.setdefault(result["scenario"], {}).setdefault(row["what"], []).append(row["value"])
    return {
        scenario: scale_factor([_errors(values) for values in known.values()])
        for scenario, known in rows.items()
        if any(len(values) > 1 for values in known.values())
    }


def _errors(values: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """One row's median and standard error in each run that has an expectation; of logarithms where all are positive."""
    values = [value for value in values if "again" in value and value["rounds"] > 1]
    positive = all(value["again"][0] > 0 for value in values)
    found = []
    for value in values:
        median, low, high = _scaled(value, positive)
        found.append((median, (high - low) / 2 / (student(value["rounds"] - 1) * math.sqrt(2))))
    return found


def _scaled(value: Mapping[str, Any], positive: bool) -> tuple[float, float, float]:
    """The median and the bounds for another run's; logarithms of positive ones."""
    median, low, high = (float(it) for it in (value["median"], *value["again"]))
    return (math.log(median), math.log(low), math.log(high)) if positive else (median, low, high)


def expectation(value: Mapping[str, Any], factor: float = 1.0) -> tuple[float, float] | None:
    """Between what another run's median lies, with 95 %; None where one round alone tells nothing of it.

    Args:
        value: of a row, as :meth:`benchmarks.stats.Interval.to_json` has it.
        factor: of :func:`factors`.
    """
    if "again" not in value or value["rounds"] < 2:
        return None
    if factor == 1:  # as it was written, to the last digit
        return value["again"][0], value["again"][1]
    positive = value["again"][0] > 0
    median, low, high = _scaled(value, positive)
    low, high = median - factor * (median - low), median + factor * (high - median)
    return (math.exp(low), math.exp(high)) if positive else (low, high)


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of both runs. ``factor``: the scenario's, of :func:`factors`."""

    scenario: str
    first: dict[str, Any]
    second: dict[str, Any]
    speed: float | None = None
    """The machine's in the second run over that in the first, where both know it."""
    factor: float = 1.0

    @property
    def expected(self) -> bool:
        value = self.first["value"]
        low, high = expectation(value, self.factor) or (value["low"], value["high"])
        return bool(low <= self.second["value"]["median"] <= high)

    @property
    def within(self) -> bool:
        value = self.first["value"]
        return bool(value["low"] <= self.second["value"]["median"] <= value["high"])

    def __str__(self) -> str:
        one, other = self.first["value"], self.second["value"]
        said = "within" if self.within else "expected" if self.expected else "APART"
        told = (
            f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]" for value in (one, other)
        )
        return f"{said:9}{self.scenario}: {self.first['what']}: {' then '.join(told)}"


@dataclass(frozen=True, slots=True)
class Compared:
    """Two runs, as far as they have the same rows. False where they have none in common."""

    pairs: Sequence[Pair]

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __str__(self) -> str:
        rows = len(self.pairs)
        expected, within = sum(pair.expected for pair in self.pairs), sum(pair.within for pair in self.pairs)
        speeds = [pair.speed for pair in self.pairs if pair.speed is not None]
        told = f"; the machine ran at {min(speeds):.2f} to {max(speeds):.2f} of the first run's speed" if speeds else ""
        return (
            f"of {rows} rows {expected} ({expected / rows:.0%}) have their second median where the first run "
            f"expected it, {within} ({within / rows:.0%}) within the 95 % interval of the first median itself{told}"
        )


def compared(
    first: Sequence[Found], second: Sequence[Found], wider: Mapping[str, float] = MappingProxyType({})
) -> Compared:
    """Two runs beside each other. ``wider``: by scenario, of :func:`factors`."""
    return Compared(list(_pairs(first, second, wider)))


def _pairs(first: Sequence[Found], second: Sequence[Found], wider: Mapping[str, float]) -> Iterator[Pair]:
    """The rows that both runs have, by scenario and name; figures of quick and of full runs are not compared."""
    known = {
        (result["scenario"], result["quick"], row["what"]): (row, result) for result in first for row in result["rows"]
    }
    for result in second:
        for row in result["rows"]:
            key = (result["scenario"], result["quick"], row["what"])
            if key in known:
                before, first_result = known[key]
                factor = 1.0 if result["quick"] else wider.get(result["scenario"], 1.0)
                yield Pair(result["scenario"], before, row, _speed(first_result, result), factor)


def _speed(first: Found, second: Found) -> float | None:
    before, after = (result.get("quiet", {}).get("speed") for result in (first, second))
    return after / before if before and after else None


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("second", type=Path)
    parser.add_argument("first", type=Path, nargs="?", default=RESULTS)
    given = parser.parse_args(words)
    kept = [RESULTS, *REPEATS.values()]
    others = [read(folder) for folder in kept if folder.resolve() != given.second.resolve()]
    found = compared(read(given.first), read(given.second), factors(others))
    if not found:
        print("no row is in both", file=sys.stderr)  # noqa: T201
        return 2
    for line in (*found.pairs, found):
        print(line)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
