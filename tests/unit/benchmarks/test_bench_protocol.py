"""Rounds, verdicts, and when a result refuses to be published."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, protocol, report
from benchmarks.found import read
from benchmarks.machine import Quiet
from benchmarks.protocol import Contender, Measured, Result, Row, Target, measure, rounded
from benchmarks.stats import Interval, bootstrap

QUIET = Quiet(0.0, 0.0, 0.1)


def given(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"quick": False, "out": None, "seed": 0, "rounds": None, "full_rounds": 5} | changed)


def result(tmp_path: Path, quiet: Quiet = QUIET, *, quick: bool = False) -> Result:
    return Result("demo", "A demonstration", quick, tmp_path, quiet)


def row(low: float, middle: float, high: float, rounds: int = 7, target: Target | None = None) -> Row:
    return Row("ours over theirs", Interval(middle, low, high, rounds), "ratio", target or Target(at_least=1.0))


def test_a_round_measures_each_contender_once_in_a_random_order() -> None:
    seen: list[tuple[str, int]] = []

    def contender(name: str) -> Contender:
        def one_round(seed: int) -> dict[str, float]:
            seen.append((name, seed))
            return {"speed": 1.0}

        return Contender(name, one_round)

    found = measure([contender(name) for name in "abc"], rounds=12, seed=4)
    rounds = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    assert len(rounds) == 13  # the first one warms up
    assert all(sorted(name for name, _ in one) == ["a", "b", "c"] for one in rounds)
    assert all(len({seed for _, seed in one}) == 1 for one in rounds), "a round asks all of them for the same"
    assert len({tuple(name for name, _ in one) for one in rounds}) > 3
    assert {name: len(figures) for name, figures in found.rounds.items()} == {"a": 12, "b": 12, "c": 12}
    assert len(found.foreign) == 36


def test_warming_up_may_be_another_load_and_never_counts() -> None:
    calls: list[str] = []

    def one_round(seed: int) -> dict[str, float]:
        calls.append("round")
        return {"speed": 1.0}

    found = measure([Contender("a", one_round, warm_up=lambda seed: calls.append("warm"))], rounds=2)
    assert calls == ["warm", "round", "round"]
    assert len(found.rounds["a"]) == 2


def test_a_slow_peer_is_compared_in_the_rounds_that_it_ran() -> None:
    speeds = iter([10.0, 20.0, 30.0, 40.0])
    ours = Contender("ours", lambda seed: {"speed": next(speeds)})
    slow = Contender("slow", lambda seed: {"speed": 5.0}, most_rounds=2)
    found = measure([ours, slow], rounds=4, warm_up=False)
    value = found.ratio("x", "ours", "slow", "speed", "tokens/s").value
    assert (value.rounds, value.low, value.high) == (2, 2.0, 4.0)


def test_no_round_begins_after_the_time_is_over() -> None:
    ours = Contender("ours", lambda seed: {"speed": 1.0})
    found = measure([ours], rounds=100, warm_up=False, budget_s=1e-9)
    assert len(found.rounds["ours"]) == protocol.FEWEST_ROUNDS


@pytest.mark.parametrize(
    ("low", "middle", "high", "target", "verdict"),
    [
        (1.1, 1.2, 1.3, Target(at_least=1.0), "reached"),
        (0.7, 0.8, 0.9, Target(at_least=1.0), "missed"),
        (0.9, 1.1, 1.3, Target(at_least=1.0), "open"),
        (0.1, 0.2, 0.24, Target(at_most=0.25), "reached"),
        (0.3, 0.4, 0.5, Target(at_most=0.25), "missed"),
        (0.0, 0.0, 0.0, Target(at_most=0), "reached"),
        (0.9, 1.1, 1.3, Target(), "reported"),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    low: float, middle: float, high: float, target: Target, verdict: str
) -> None:
    assert target.verdict(Interval(middle, low, high, 5)) == verdict


def test_a_quiet_machine_and_enough_rounds_are_published(tmp_path: Path) -> None:
    made = result(tmp_path)
    made.add(Measured({}, [0.01, 0.02]), row(1.1, 1.2, 1.3))
    assert (made.finish()["publishable"], made.finish()["problems"]) == (True, [])


@pytest.mark.parametrize(
    ("quiet", "foreign", "rounds", "problem"),
    [
        (Quiet(0.6, 0.0, 3.0), 0.0, 7, "others took 60% of the processors before the run"),
        (Quiet(0.0, 0.2, 0.1), 0.0, 7, "the host took 20% of the processors before the run"),
        (QUIET, 0.3, 7, "others took 30% of the processors during the rounds"),
        (QUIET, 0.0, 2, "only 2 rounds"),
    ],
)
def test_what_cannot_be_relied_on_is_refused_with_the_reason(
    tmp_path: Path, quiet: Quiet, foreign: float, rounds: int, problem: str
) -> None:
    made = result(tmp_path, quiet)
    if quiet.problem:
        made.problems.append(quiet.problem)
    made.add(Measured({}, [foreign]), row(1.1, 1.2, 1.3, rounds))
    found = made.finish()
    assert found["publishable"] is False
    assert any(text.startswith(problem) for text in found["problems"])


def test_a_quick_run_is_marked_and_never_lies_over_a_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "look", lambda seconds: QUIET)
    made = Result.begin("demo", "A demonstration", given(quick=True))
    assert made.out == protocol.RESULTS / "quick"
    assert made.finish()["publishable"] is False


def test_a_busy_machine_is_noticed_at_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "look", lambda seconds: Quiet(0.5, 0.0, 2.0))
    assert Result.begin("demo", "A demonstration", given()).finish()["publishable"] is False


def test_numbers_are_written_with_five_digits() -> None:
    assert rounded({"a": [1.23456789, 2], "b": (0.000123456789,)}) == {"a": [1.2346, 2], "b": [0.00012346]}


def test_the_report_shows_what_was_written_and_keeps_apart_what_is_not_for_publication(tmp_path: Path) -> None:
    good = result(tmp_path)
    good.add(
        Measured({}, [0.0]),
        row(1.1, 1.2, 1.3),
        Row("repeated", Interval(2.0, 1.9, 2.1, 5, again=(1.75, 2.25)), "ratio"),
    )
    bad = Result("other", "A busy machine", False, tmp_path, QUIET, problems=["others took 60% of the processors"])
    bad.add(Measured({}, [0.0]), Row("µs", bootstrap([1234.5] * 7), "µs"))
    for made in (good, bad):
        path = made.write()
        assert json.loads(path.read_text())["rows"]
    text = report.tables({"first": read(tmp_path)})
    assert text.index("A demonstration") < text.index("not to be relied on") < text.index("A busy machine")
    assert "| ours over theirs |  | 1.2 [1.1, 1.3] |  | ≥ 1 | reached |" in text
    assert "| repeated |  | 2 [1.9, 2.1] | 1.75 to 2.25 |  | reported |" in text
    assert "1,234 [1,234, 1,234] µs" in text
    assert "**Not for publication:** others took 60% of the processors." in text
    assert "Each run" not in text and "further apart" not in text
    assert "empty loop" not in text
    twice = report.tables({"first": read(tmp_path), "second": read(tmp_path)})
    assert "* the first: of 2 rows 2 (100%) have their median where the others expect it" in twice
    assert "further apart the runs lie than their own rounds tell: demo 1.00." in twice


def test_the_machines_speed_stands_beside_a_result(tmp_path: Path) -> None:
    quiet = machine.look(0.01)
    made = result(tmp_path, quiet)
    made.add(Measured({}, [0.0]), row(1.1, 1.2, 1.3))
    written = json.loads(made.write().read_text())["quiet"]["speed"]
    assert quiet.speed is not None and 0 < written == round(quiet.speed, 2)
    assert f"an empty loop of Python runs {written:.3g} million times per second" in report.tables(
        {"first": read(tmp_path)}
    )


def test_files_of_another_kind_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "simulation.json").write_text('{"hitRates": []}')
    assert read(tmp_path) == []
