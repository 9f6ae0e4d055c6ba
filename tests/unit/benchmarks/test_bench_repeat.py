"""Two runs of the same scenarios beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.repeat import main


def write(folder: Path, values: dict[str, tuple[float, float, float]], quick: bool = False) -> Path:
    named = [(what, dict(zip(("low", "median", "high"), found, strict=True))) for what, found in values.items()]
    rows: list[dict[str, Any]] = [{"what": what, "value": value} for what, value in named]
    folder.mkdir(exist_ok=True)
    (folder / "one.json").write_text(json.dumps({"scenario": "one", "quick": quick, "rows": rows}))
    return folder


def test_each_row_of_both_runs_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", {"x": (1, 2, 3), "y": (1, 2, 3), "z": (1, 2, 3), "gone": (1, 2, 3)})
    second = write(tmp_path / "b", {"x": (0, 3, 9), "y": (2.9, 3.1, 4), "z": (4, 5, 6), "new": (1, 2, 3)})
    assert main([str(second), str(first)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["within", "touches", "APART", "3"]
    assert told[-1] == "3 rows: 33% of the medians within, 67% of the intervals touch"


def test_a_quick_run_is_not_held_against_a_full_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"x": (1, 2, 3)})
    assert main([str(write(tmp_path / "b", {"x": (1, 2, 3)}, quick=True)), str(first)]) == 2
