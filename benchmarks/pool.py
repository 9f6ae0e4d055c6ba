"""Several runs of the same scenarios as one: what is published of a scenario that was run in more than one hour.

Rounds that follow each other know nothing of what differs from one hour to another. So a scenario has a factor: how
many times further apart its runs' medians lie than their rounds tell (:func:`benchmarks.stats.scale_factor`). A row's
figure is the mean of its runs' medians, of their logarithms where they are positive, and both its interval and the
bounds for another run are wider by that factor. Verdicts are of these intervals.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.found import Found
from benchmarks.protocol import Target
from benchmarks.stats import Interval, Runs, scale_factor, student

Rows = Sequence[Found | None]
"""One row in each run; None where one has it not."""


def pooled(runs: Sequence[Sequence[Found]]) -> list[Found]:
    """One result for each scenario of any of the runs, in the order of the first one; quick ones are apart.

    A result of several runs has them in ``runs`` and their factor in ``factor``, and each of its rows has the runs'
    ``medians``, None where one has not the row. Results that are not for publication are left out where others are.
    """
    groups: dict[tuple[str, bool], list[Found]] = {}
    for result in (result for run in runs for result in run):
        groups.setdefault((result["scenario"], result["quick"]), []).append(result)
    return [_one([it for it in group if it["publishable"]] or group[:1]) for group in groups.values()]


def same(what: str) -> str:
    """A row's name, the same whichever peer was the better one in a run."""
    return re.sub(r"against .*, the better one$", "against the better peer", what)


def expected(value: Mapping[str, Any]) -> tuple[float, float] | None:
    """Between what another run's median lies, with 95 %; None where nobody knows, as of one round alone."""
    return (value["again"][0], value["again"][1]) if "again" in value and value["rounds"] > 1 else None


def _one(group: Sequence[Found]) -> Found:
    if len(group) == 1:
        return group[0]
    names = {same(row["what"]): None for result in group for row in result["rows"]}
    lines = [[_named(result, name) for result in group] for name in names]
    factor = scale_factor([runs for line in lines if (runs := _runs(line, _scale(line)[0]))])
    rows = [_row(name, line, factor) for name, line in zip(names, lines, strict=True)]
    details = group[0]["details"]
    for result in group[1:]:
        details = _joined(details, result["details"])
    return {**group[0], "rows": rows, "details": details, "runs": group, "factor": factor}


def _named(result: Found, name: str) -> Found | None:
    return next((row for row in result["rows"] if same(row["what"]) == name), None)


def _row(name: str, line: Rows, factor: float) -> Found:
    rows = [row for row in line if row is not None]
    scaled, back = _scale(line)
    runs = _runs(line, scaled)
    value: Mapping[str, Any] = rows[0]["value"]
    if runs is not None:
        low, high = map(back, runs.bounds(factor))
        again = runs.bounds(factor, another=True)
        rounds = sum(row["value"]["rounds"] for row in rows)
        value = Interval(back(runs.middle), low, high, rounds, (back(again[0]), back(again[1]))).to_json()
    names = dict.fromkeys(side for row in rows for side in row["sides"])
    sides = {side: median(row["sides"][side] for row in rows if side in row["sides"]) for side in names}
    found = Interval(value["median"], value["low"], value["high"], value["rounds"])
    return {
        **rows[0],
        "what": name,
        "value": value,
        "verdict": Target(**rows[0]["target"]).verdict(found),
        "sides": sides,
        "medians": [row and row["value"]["median"] for row in line],
    }


Scale = Callable[[float], float]


def _scale(line: Rows) -> tuple[Scale, Scale]:
    """Logarithms where all values are positive, and the way back."""
    values = [row["value"] for row in line if row is not None]
    positive = all(value.get("again", [value["low"]])[0] > 0 for value in values)
    return (math.log, math.exp) if positive else (float, float)


def _runs(line: Rows, scaled: Scale) -> Runs | None:
    """Of the runs whose rounds tell of their spread; None for fewer than two."""
    told = []
    for value in (row["value"] for row in line if row is not None):
        if (bounds := expected(value)) is not None:
            low, high = map(scaled, bounds)
            freedom = value["rounds"] - 1
            # As benchmarks.stats.another made them: the error of a median, times that of a difference of two.
            told.append((scaled(value["median"]), (high - low) / 2 / (student(freedom) * math.sqrt(2)), freedom))
    if len(told) < 2:
        return None
    medians, errors, freedoms = zip(*told, strict=True)
    return Runs(medians, errors, freedoms)


def _joined(one: Any, other: Any) -> Any:
    """The rounds of both, below the same names."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {**one, **other} | {name: _joined(one[name], other[name]) for name in one if name in other}
    return [*one, *other] if isinstance(one, list) and isinstance(other, list) else one
