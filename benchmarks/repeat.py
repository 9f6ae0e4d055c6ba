"""Whether a second run of the same scenarios says what the first one said.

``python -m benchmarks.repeat SECOND [FIRST]``: folders of results (FIRST is ``benchmarks/results``). For each row that
both have: does the second run's median lie where the first one expected it, and within the 95 % interval of the first
one's own median? Of two runs each has its error, so the latter holds in some five of six rows at best. Neither
knows how fast the machine was: its speed before each run (benchmarks.machine.speed) is told where both runs have it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.found import Found, number, read
from benchmarks.protocol import RESULTS


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of both runs."""

    scenario: str
    first: dict[str, Any]
    second: dict[str, Any]
    speed: float | None = None
    """The machine's in the second run over that in the first, where both know it."""

    @property
    def expected(self) -> bool:
        value = self.first["value"]
        low, high = value.get("again", (value["low"], value["high"]))
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


def compared(first: Sequence[Found], second: Sequence[Found]) -> Compared:
    """Two runs beside each other."""
    return Compared(list(_pairs(first, second)))


def _pairs(first: Sequence[Found], second: Sequence[Found]) -> Iterator[Pair]:
    """The rows that both runs have, by scenario and name; figures of quick and of full runs are not compared."""
    known = {
        (result["scenario"], result["quick"], row["what"]): (row, result) for result in first for row in result["rows"]
    }
    for result in second:
        for row in result["rows"]:
            key = (result["scenario"], result["quick"], row["what"])
            if key in known:
                before, first_result = known[key]
                yield Pair(result["scenario"], before, row, _speed(first_result, result))


def _speed(first: Found, second: Found) -> float | None:
    before, after = (result.get("quiet", {}).get("speed") for result in (first, second))
    return after / before if before and after else None


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("second", type=Path)
    parser.add_argument("first", type=Path, nargs="?", default=RESULTS)
    given = parser.parse_args(words)
    found = compared(read(given.first), read(given.second))
    if not found:
        print("no row is in both", file=sys.stderr)  # noqa: T201
        return 2
    for line in (*found.pairs, found):
        print(line)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
