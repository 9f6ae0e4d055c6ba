"""Plans of load: their statistics, and that a seed fixes them."""

from collections import Counter
from itertools import islice, pairwise
from statistics import fmean, pstdev

import pytest

from benchmarks.arrivals import Prompts, gamma_times, plan, zipf_models


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    times = gamma_times(rate=20, count=20_000, burstiness=burstiness, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0
    assert fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_an_endless_burstiness_is_a_metronome_and_an_endless_rate_is_all_at_once() -> None:
    assert gamma_times(4, 4, float("inf"), 0) == [0, 0.25, 0.5, 0.75]
    assert gamma_times(float("inf"), 3, 1, 0) == [0, 0, 0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_what_is_no_rate_is_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        gamma_times(rate, 10, burstiness, 0)


def test_models_are_drawn_by_their_rank() -> None:
    drawn = Counter(islice(zipf_models(["a", "b", "c"], 1.0, seed=5), 60_000))
    weights = {"a": 1, "b": 1 / 2, "c": 1 / 3}
    for model, weight in weights.items():
        assert drawn[model] / 60_000 == pytest.approx(weight / sum(weights.values()), rel=0.03)


def test_a_seed_fixes_the_whole_plan() -> None:
    first, again, other = (plan(["a", "b"], 50, seed=seed, rate=3, zipf=1.0) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_prompts_are_as_long_as_asked() -> None:
    lengths = [len(one.prompt.split()) for one in plan(["a"], 400, seed=0, prompts=Prompts(128, 0.5))]
    assert min(lengths) >= 64
    assert max(lengths) <= 192
    assert fmean(lengths) == pytest.approx(128, rel=0.05)


def test_a_closed_loop_has_no_times() -> None:
    assert {one.at for one in plan(["a"], 10, seed=0)} == {0.0}
