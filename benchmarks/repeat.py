"""Whether another run of the same scenarios says what earlier ones said.

``python -m benchmarks.repeat RUN [EARLIER ...]``: folders of results; EARLIER are the runs that are kept in
``benchmarks/results`` (without RUN, if it is one of them). For each row that both sides have: does its median lie where
the earlier runs expect another's, and within the 95 % interval of their own figure? Of two runs each has its error, so
the latter holds in fewer rows. One earlier run knows only its own rounds, and nothing of how hours differ: several say
more (:mod:`benchmarks.pool`). How fast the machine was before each run (benchmarks.machine.speed) is told where both
sides have it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.found import KEPT, Found, number, read
from benchmarks.pool import expected, pooled, same


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of the earlier runs and of the one that is judged."""

    scenario: str
    earlier: Found
    later: Found
    speed: float | None = None
    """The machine's in the later run over that in the earlier ones, where both know it."""

    @property
    def expected(self) -> bool:
        value = self.earlier["value"]
        low, high = expected(value) or (value["low"], value["high"])
        return bool(low <= self.later["value"]["median"] <= high)

    @property
    def within(self) -> bool:
        value = self.earlier["value"]
        return bool(value["low"] <= self.later["value"]["median"] <= value["high"])

    def __str__(self) -> str:
        said = "within" if self.within else "expected" if self.expected else "APART"
        told = (
            f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]"
            for value in (self.earlier["value"], self.later["value"])
        )
        return f"{said:9}{self.scenario}: {self.earlier['what']}: {' then '.join(told)}"


@dataclass(frozen=True, slots=True)
class Compared:
    """A run beside earlier ones, as far as they have the same rows. False where they have none in common."""

    pairs: Sequence[Pair]

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __str__(self) -> str:
        rows = len(self.pairs)
        expected, within = sum(pair.expected for pair in self.pairs), sum(pair.within for pair in self.pairs)
        speeds = [pair.speed for pair in self.pairs if pair.speed is not None]
        told = f"; the machine ran at {min(speeds):.2f} to {max(speeds):.2f} of their speed" if speeds else ""
        return (
            f"of {rows} rows {expected} ({expected / rows:.0%}) have their median where the others expect it, "
            f"{within} ({within / rows:.0%}) within the 95 % interval of the others' figure{told}"
        )


def compared(earlier: Sequence[Sequence[Found]], later: Sequence[Found]) -> Compared:
    """A run beside earlier ones; figures of quick and of full runs are not compared."""
    return Compared(list(_pairs(pooled(earlier), later)))


def _pairs(earlier: Sequence[Found], later: Sequence[Found]) -> Iterator[Pair]:
    known = {
        (result["scenario"], result["quick"], same(row["what"])): (row, result)
        for result in earlier
        for row in result["rows"]
    }
    for result in later:
        for row in result["rows"]:
            found = known.get((result["scenario"], result["quick"], same(row["what"])))
            if found is not None:
                yield Pair(result["scenario"], found[0], row, _speed(found[1], result))


def _speed(earlier: Found, later: Found) -> float | None:
    before = [speed for run in earlier.get("runs", [earlier]) if (speed := _quiet(run))]
    after = _quiet(later)
    return after / median(before) if before and after else None


def _quiet(result: Found) -> float | None:
    found: Mapping[str, float] = result.get("quiet", {})
    return found.get("speed")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("earlier", type=Path, nargs="*", help="the kept runs, if none is given")
    given = parser.parse_args(words)
    earlier = given.earlier or [folder for folder in KEPT.values() if folder.resolve() != given.run.resolve()]
    found = compared([read(folder) for folder in earlier], read(given.run))
    if not found:
        print("no row is in both", file=sys.stderr)  # noqa: T201
        return 2
    for line in (*found.pairs, found):
        print(line)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
