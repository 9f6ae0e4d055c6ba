"""The chance that a model is asked for next."""

import pytest

from benchmarks.traces import bursty, zipf
from serve_app.domain.popularity import Popularity


def test_the_chances_of_all_models_add_up_to_one() -> None:
    popularity = Popularity()
    for name in zipf(500, 20, seed=1):
        popularity.arrived(name)
    assert sum(popularity.chance(f"m{index:04d}") for index in range(20)) == pytest.approx(1.0)


def test_steady_popularity_moves_the_weight_to_long_memory() -> None:
    popularity = Popularity()
    for name in zipf(4000, 200, seed=1):
        popularity.arrived(name)
    assert sum(popularity.weights[-3:]) > 0.9
    assert popularity.chance("m0000") > popularity.chance("m0005") > popularity.chance("m0100")


def test_sessions_move_the_weight_to_short_memory() -> None:
    popularity = Popularity()
    for name in bursty(4000, 200, seed=1):
        popularity.arrived(name)
    assert sum(popularity.weights[:3]) > 0.6


def test_a_model_that_was_never_asked_for_has_no_chance() -> None:
    popularity = Popularity()
    assert popularity.chance("a") == 0
    popularity.arrived("a", times=3)
    assert popularity.chance("a") == pytest.approx(1) and popularity.chance("b") == 0
    popularity.forget("a")
    assert popularity.chance("a") == 0
