"""Two runs of the same scenarios beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.found import REPEATS, Found, read
from benchmarks.repeat import compared, expectation, factors, main

Values = dict[str, tuple[float, float, float]]


def write(
    folder: Path, values: Values, quick: bool = False, again: tuple[float, float] | None = None, speed: float = 0
) -> Path:
    rows: list[dict[str, Any]] = [
        {"what": what, "value": {"rounds": 3, **dict(zip(("low", "median", "high"), found, strict=True))}}
        for what, found in values.items()
    ]
    for row in rows:
        row["value"] |= {"again": again} if again else {}
    folder.mkdir(exist_ok=True)
    quiet = {"speed": speed} if speed else {}
    found = {"scenario": "one", "quick": quick, "rows": rows, "quiet": quiet}
    (folder / "one.json").write_text(json.dumps(found))
    return folder


def test_each_row_of_both_runs_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", dict.fromkeys(("x", "y", "z", "gone"), (1, 2, 3)), again=(0.5, 4))
    second = write(tmp_path / "b", {"x": (0, 3, 9), "y": (2.9, 3.1, 4), "z": (2, 5, 6), "new": (1, 2, 3)})
    assert main([str(second), str(first)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["within", "expected", "APART", "of"]
    assert told[-1].startswith("of 3 rows 2 (67%) have their second median where the first run expected it, 1 (33%) ")


def test_without_an_expectation_the_interval_of_the_median_is_what_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write(tmp_path / "a", {"x": (1, 2, 3)}), write(tmp_path / "b", {"x": (3, 3.5, 4)})
    assert main([str(second), str(first)]) == 0
    assert capsys.readouterr().out.startswith("APART")


def test_a_quick_run_is_not_held_against_a_full_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"x": (1, 2, 3)})
    assert main([str(write(tmp_path / "b", {"x": (1, 2, 3)}, quick=True)), str(first)]) == 2


def test_a_machine_that_was_not_as_fast_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", {"x": (1, 2, 3)}, speed=80)
    assert main([str(write(tmp_path / "b", {"x": (1, 2, 3)}, speed=60)), str(first)]) == 0
    assert capsys.readouterr().out.endswith("; the machine ran at 0.75 to 0.75 of the first run's speed\n")
    assert main([str(write(tmp_path / "c", {"x": (1, 2, 3)})), str(first)]) == 0
    assert "speed" not in capsys.readouterr().out


def several(medians: tuple[float, ...], quick: bool = False) -> list[list[Found]]:
    """Runs whose rounds all tell of a tenth, whatever their medians."""
    found = []
    for median in medians:
        value = {"median": median, "low": median, "high": median, "rounds": 7, "again": [median / 1.1, median * 1.1]}
        found.append([{"scenario": "one", "quick": quick, "rows": [{"what": "x", "value": value}]}])
    return found


def test_runs_that_lie_further_apart_than_their_rounds_tell_widen_what_is_expected() -> None:
    calm, apart = factors(several((10, 10.1, 9.9))), factors(several((10, 13, 8)))
    assert calm == {"one": 1} and apart["one"] > 3
    first, later = several((10, 13))
    assert not compared(first, later).pairs[0].expected
    assert compared(first, later, apart).pairs[0].expected
    low, high = expectation(first[0]["rows"][0]["value"], 2) or (0, 0)
    assert (low, high) == pytest.approx((10 / 1.1**2, 10 * 1.1**2))


def test_differences_that_may_be_negative_are_widened_as_they_are() -> None:
    value = {"median": 1.0, "low": 0.5, "high": 1.5, "rounds": 7, "again": [-1.0, 2.0]}
    assert expectation(value, 2) == (-3, 3)
    assert expectation(value) == (-1, 2)


def test_one_run_or_a_quick_one_or_one_round_says_nothing_of_others() -> None:
    assert factors(several((10,))) == {}
    assert factors(several((10, 20), quick=True)) == {}
    assert expectation({"median": 1.0, "rounds": 1, "again": [1.0, 1.0]}, 2) is None
    assert expectation({"median": 1.0, "rounds": 7}, 2) is None
    quick = several((10, 13), quick=True)
    assert not compared(*quick, {"one": 9.0}).pairs[0].expected


def test_a_kept_run_has_no_say_in_what_is_expected_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    third = REPEATS["A third run"]
    assert main([str(third)]) == 0
    kept = [read(), *map(read, REPEATS.values())]
    without = [read(), *(read(folder) for folder in REPEATS.values() if folder != third)]
    judged, with_itself = (str(compared(read(), read(third), factors(runs))) for runs in (without, kept))
    assert judged != with_itself
    assert judged in capsys.readouterr().out
