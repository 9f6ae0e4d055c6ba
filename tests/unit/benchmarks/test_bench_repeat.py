"""Two runs of the same scenarios beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.found import KEPT, read
from benchmarks.repeat import compared, main

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
    found = {"scenario": "one", "quick": quick, "publishable": True, "rows": rows, "quiet": quiet}
    (folder / "one.json").write_text(json.dumps(found))
    return folder


def test_each_row_of_both_runs_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", dict.fromkeys(("x", "y", "z", "gone"), (1, 2, 3)), again=(0.5, 4))
    second = write(tmp_path / "b", {"x": (0, 3, 9), "y": (2.9, 3.1, 4), "z": (2, 5, 6), "new": (1, 2, 3)})
    assert main([str(second), str(first)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["within", "expected", "APART", "of"]
    assert told[-1].startswith("of 3 rows 2 (67%) have their median where the others expect it, 1 (33%) ")


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
    assert capsys.readouterr().out.endswith("; the machine ran at 0.75 to 0.75 of their speed\n")
    assert main([str(write(tmp_path / "c", {"x": (1, 2, 3)})), str(first)]) == 0
    assert "speed" not in capsys.readouterr().out


def test_a_kept_run_has_no_say_in_what_is_expected_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    third = KEPT["third"]
    assert main([str(third)]) == 0
    others = [read(folder) for folder in KEPT.values() if folder != third]
    judged, with_itself = (str(compared(runs, read(third))) for runs in (others, [*others, read(third)]))
    assert judged != with_itself
    assert judged in capsys.readouterr().out


def test_the_last_run_that_is_kept_lies_where_those_before_it_expect_it() -> None:
    *earlier, last = map(read, KEPT.values())
    pairs = compared(earlier, last).pairs
    assert len(pairs) > 70 and sum(pair.expected for pair in pairs) / len(pairs) >= 0.9
