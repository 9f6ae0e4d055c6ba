"""Percentiles, intervals and ratios of rounds."""

import math
import random
from statistics import median

import numpy
import pytest

from benchmarks.stats import Runs, another, bootstrap, paired_ratio, percentile, scale_factor, slope, summary


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 99, 100])
def test_percentiles_are_those_of_numpy(percent: float) -> None:
    rng = random.Random(1)
    values = [rng.random() for _ in range(37)]
    assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


def test_no_values_have_no_percentile() -> None:
    assert math.isnan(percentile([], 50))
    assert summary([], "ttft_ms", (99.0,)) == {
        "mean_ttft_ms": None, "median_ttft_ms": None, "std_ttft_ms": None, "p99_ttft_ms": None,
    }  # fmt: skip


def test_a_summary_has_vllms_names() -> None:
    found = summary([1.0, 2.0, 3.0], "ttft_ms", (50.0, 99.0))
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == found["p50_ttft_ms"] == 2
    assert found["std_ttft_ms"] == pytest.approx(float(numpy.std([1, 2, 3])))
    assert found["p99_ttft_ms"] == pytest.approx(2.98)


def test_an_interval_holds_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(2)
    held = 0
    for trial in range(60):
        found = bootstrap([rng.gauss(10, 2) for _ in range(15)], seed=trial)
        assert found.low <= found.median <= found.high
        held += found.low <= 10 <= found.high
    assert held >= 51  # 95 % of 60 is 57; the percentile bootstrap of a median is a little narrow


def test_few_rounds_have_their_extremes_as_interval() -> None:
    found = bootstrap([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.rounds) == (2, 1, 3, 3)


@pytest.mark.parametrize("rounds", [2, 3, 5, 7, 15])
def test_another_run_has_its_median_where_the_first_expects_it(rounds: int) -> None:
    rng, held, trials = random.Random(rounds), 0, 1000
    for _ in range(trials):
        first, second = ([rng.lognormvariate(1, 0.1) for _ in range(rounds)] for _ in range(2))
        low, high = another(first)
        held += low <= median(second) <= high
    assert 0.93 * trials <= held <= 0.99 * trials


def test_what_is_expected_of_another_run_holds_the_interval_of_this_one() -> None:
    for values in ([1.0, 1.1, 5.0], [-3.0, 0.0, 1.0], [2.0, 2.0], [7.0], [1.0, 1.0, 1.0, 1.0, 1.0, 9.0]):
        found = bootstrap(values)
        assert found.again is not None
        assert found.again[0] <= found.low <= found.median <= found.high <= found.again[1]
        assert found.to_json()["again"] == list(found.again)


@pytest.mark.parametrize("hours", [0.0, 3.0])
def test_the_scale_factor_finds_what_differs_between_runs(hours: float) -> None:
    rng, rows = random.Random(7), []
    for row in range(400):
        medians = tuple(row + rng.gauss(0, math.hypot(0.1, 0.1 * hours)) for _ in range(3))
        rows.append(Runs(medians, (0.1,) * 3, (4,) * 3))
    assert scale_factor(rows) == pytest.approx(max(1.0, math.hypot(1, hours)), rel=0.1)


def test_the_scale_factor_never_narrows_and_needs_rows_that_say_something() -> None:
    assert scale_factor([Runs((1.0, 1.0), (0.5, 0.5), (4, 4))]) == 1
    assert scale_factor([]) == 1
    alike, alone = Runs((1.0, 2.0), (0.0, 0.0), (4, 4)), Runs((5.0,), (0.1,), (4,))
    assert scale_factor([alike, alone]) == 1
    assert scale_factor([alike, alone, Runs((1.0, 5.0), (1.0, 1.0), (4, 4))]) == pytest.approx(math.sqrt(8))


def test_runs_have_one_error_and_a_calm_one_does_not_outweigh_the_others() -> None:
    runs = Runs((1.0, 2.0), (0.01, math.sqrt(2)), (2, 2))
    assert runs.middle == 1.5 and runs.error == pytest.approx(1, rel=1e-3)
    low, high = runs.bounds(2.0)
    assert (low, high) == pytest.approx((1.5 - 2.776 * 2 / math.sqrt(2), 1.5 + 2.776 * 2 / math.sqrt(2)), rel=1e-3)
    assert runs.bounds(2.0, another=True)[1] - 1.5 == pytest.approx((high - 1.5) * math.sqrt(3))


def test_a_ratio_is_of_pairs_and_not_of_medians() -> None:
    # The second round ran on a slower machine: both did half as much, and the ratio is the same.
    assert paired_ratio([300, 150, 300], [200, 100, 200]).median == 1.5
    with pytest.raises(ValueError):
        paired_ratio([1, 2], [1])


def test_an_interval_crosses_a_target_that_it_leaves_open() -> None:
    found = bootstrap([0.9, 1.0, 1.2])
    assert found.crosses(1.1)
    assert not found.crosses(0.8)
    assert not found.crosses(1.3)


def test_a_slope_is_that_of_the_line() -> None:
    assert slope([(x, 3.0 * x + 1) for x in range(10)]) == pytest.approx(3)
    assert slope([(1.0, 5.0)]) == 0
