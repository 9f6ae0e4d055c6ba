"""Several runs of the same scenarios as one, and what is said of them on the page."""

from __future__ import annotations

import math
import random
from statistics import median
from typing import Any

import pytest

from benchmarks import report
from benchmarks.found import Found
from benchmarks.pool import pooled, same
from benchmarks.repeat import compared
from benchmarks.stats import Interval, another

BOUND = {"at_least": 1.0}


def value_of(rounds: list[float]) -> dict[str, Any]:
    """As a run writes it; the interval without resampling, which is slow."""
    return Interval(median(rounds), min(rounds), max(rounds), len(rounds), another(rounds)).to_json()


def result(rows: dict[str, list[float]], day: int = 1, **more: Any) -> Found:
    """A result with these rounds, each row of which is to be at least one."""
    made = [
        {
            "what": what, "value": value_of(rounds), "unit": "ratio", "target": BOUND, "verdict": "reached",
            "sides": {"ours": rounds[0], "theirs": 1.0}, "sides_unit": "ms",
        }
        for what, rounds in rows.items()
    ]  # fmt: skip
    machine = {"date": f"2030-01-0{day}T00:00:00Z", "processor": "P", "cores": 2, "memory_gib": 8, "versions": {}}
    return {
        "scenario": "one", "title": "One", "command": "python", "quick": False, "publishable": True, "problems": [],
        "machine": machine, "quiet": {}, "foreign_share": day / 100, "settings": {}, "rows": made,
        "details": {"8": {"ours": [{"rate": day}]}, "note": "kept"}, **more,
    }  # fmt: skip


def near(middle: float, wide: float = 0.02) -> list[float]:
    return [middle * (1 + wide * step) for step in (-1, -0.5, 0, 0.5, 1)]


def test_one_run_is_what_it_was() -> None:
    alone = result({"x": near(2)})
    assert pooled([[alone]]) == [alone]


def test_the_figure_of_several_runs_is_their_mean_and_both_intervals_know_how_far_they_differ() -> None:
    [calm] = pooled([[result({"x": near(middle)})] for middle in (2, 2.01, 1.99)])
    [apart] = pooled([[result({"x": near(middle)})] for middle in (2, 4, 1)])
    assert calm["factor"] == 1 and apart["factor"] > 10
    value = apart["rows"][0]["value"]
    assert value["median"] == pytest.approx(2) and value["rounds"] == 15  # of logarithms: 1, 2 and 4
    assert value["again"][0] < value["low"] < 1 and 4 < value["high"] < value["again"][1]
    assert calm["rows"][0]["value"]["low"] > 1.95
    assert apart["rows"][0]["medians"] == [2, 4, 1]


def test_a_verdict_is_of_all_runs() -> None:
    verdicts = [
        pooled([[result({"x": near(middle)})] for middle in middles])[0]["rows"][0]["verdict"]
        for middles in ((1.2, 1.21, 1.22), (1.2, 0.9, 1.1), (0.8, 0.81, 0.8))
    ]
    assert verdicts == ["reached", "open", "missed"]


def test_what_may_be_negative_is_put_together_as_it_is() -> None:
    [found] = pooled([[result({"x": [-1.0, 0.0, 1.0, 2.0, 3.0]})], [result({"x": [-2.0, -1.0, 0.0, 1.0, 2.0]})]])
    assert found["rows"][0]["value"]["median"] == pytest.approx(0.5)


def test_a_row_that_one_run_lacks_is_of_the_others_and_the_better_peer_is_one_row() -> None:
    first = result({"TTFT p50 against a, the better one": near(1), "x": near(1)})
    second = result({"TTFT p50 against b, the better one": near(2)}, day=2)
    [found] = pooled([[first], [second]])
    better, x = found["rows"]
    assert better["what"] == "TTFT p50 against the better peer" and better["medians"] == [1, 2]
    assert x["medians"] == [1, None] and x["value"] == first["rows"][1]["value"]
    assert same("5M: tokens/s against llama.cpp") == "5M: tokens/s against llama.cpp"


def test_what_is_not_for_publication_is_left_out_where_others_are_and_quick_runs_are_apart() -> None:
    good, bad = result({"x": near(1)}), result({"x": near(5)}, publishable=False)
    assert pooled([[bad], [good], [bad]]) == [good]
    assert pooled([[bad]]) == [bad]
    quick = result({"x": near(3)}, quick=True)
    assert pooled([[good], [quick]]) == [good, quick]


def test_the_rounds_of_all_runs_are_plotted() -> None:
    [found] = pooled([[result({"x": near(1)}, day)] for day in (1, 2)])
    assert found["details"] == {"8": {"ours": [{"rate": 1}, {"rate": 2}]}, "note": "kept"}


@pytest.mark.parametrize("hours", [0.0, 0.1], ids=["rounds alone", "hours differ as well"])
def test_19_of_20_runs_lie_where_three_others_expect_them(hours: float) -> None:
    rng = random.Random(7)
    held = total = 0
    for _ in range(40):
        runs = []
        for _ in range(4):
            drift = [rng.gauss(0, hours) for _ in range(12)]
            drawn = [[math.exp(shift + rng.gauss(0, 0.05)) for _ in range(7)] for shift in drift]
            runs.append([result({f"row {number}": row for number, row in enumerate(drawn)})])
        pairs = compared(runs[:3], runs[3]).pairs
        held, total = held + sum(pair.expected for pair in pairs), total + len(pairs)
    assert 0.93 < held / total < 0.985


def test_the_page_shows_each_run_beside_the_others() -> None:
    runs = {name: [result({"x": near(middle)}, day)] for day, (name, middle) in enumerate(
        {"first": 2.0, "second": 2.01, "third": 9.0}.items(), 1)}  # fmt: skip
    text = report.tables(runs)
    assert "* the third: of 1 rows 0 (0%) have their median where the others expect it" in text
    assert " (2, 2.01, 9) | ≥ 1 |" in text
    assert "2030-01-01 and 2030-01-02 and 2030-01-03, P" in text
    assert "3 runs of 5 rounds; others took 1% to 3% of the processors" in text
