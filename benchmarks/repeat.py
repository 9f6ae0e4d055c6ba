"""Whether a second run of the same scenarios says what the first one said.

``python -m benchmarks.repeat SECOND [FIRST]``: folders of results (FIRST is ``benchmarks/results``). For each row that
both have: does the second run's median lie within the first one's 95 % interval, and do the two intervals touch?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import RESULTS
from benchmarks.report import Found, number, read


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of both runs."""

    scenario: str
    first: dict[str, Any]
    second: dict[str, Any]

    @property
    def within(self) -> bool:
        value = self.first["value"]
        return bool(value["low"] <= self.second["value"]["median"] <= value["high"])

    @property
    def touch(self) -> bool:
        one, other = self.first["value"], self.second["value"]
        return bool(one["low"] <= other["high"] and other["low"] <= one["high"])

    def __str__(self) -> str:
        one, other = self.first["value"], self.second["value"]
        said = "within" if self.within else "touches" if self.touch else "APART"
        told = (
            f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]" for value in (one, other)
        )
        return f"{said:8}{self.scenario}: {self.first['what']}: {' then '.join(told)}"


def pairs(first: Sequence[Found], second: Sequence[Found]) -> Iterator[Pair]:
    """The rows that both runs have, by scenario and name; figures of quick and of full runs are not compared."""
    known = {(result["scenario"], result["quick"], row["what"]): row for result in first for row in result["rows"]}
    for result in second:
        for row in result["rows"]:
            before = known.get((result["scenario"], result["quick"], row["what"]))
            if before is not None:
                yield Pair(result["scenario"], before, row)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("second", type=Path)
    parser.add_argument("first", type=Path, nargs="?", default=RESULTS)
    given = parser.parse_args(words)
    found = list(pairs(read(given.first), read(given.second)))
    if not found:
        print("no row is in both", file=sys.stderr)  # noqa: T201
        return 2
    for pair in found:
        print(pair)  # noqa: T201
    within, touch = (sum(told) / len(found) for told in zip(*((one.within, one.touch) for one in found), strict=True))
    print(f"{len(found)} rows: {within:.0%} of the medians within, {touch:.0%} of the intervals touch")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
