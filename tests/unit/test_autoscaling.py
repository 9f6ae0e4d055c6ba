"""The policy that Serve's controller runs, on contexts as Serve makes them."""

from types import SimpleNamespace
from typing import Any

from deployments.autoscaling import SILENCE_S, scale


def context(**given: Any) -> Any:
    figures = {
        name: {"r1": [SimpleNamespace(timestamp=0, value=given.pop(name))]}
        for name in ("granted", "floor")
        if name in given
    }
    values: dict[str, Any] = {
        "total_num_requests": 0,
        "current_num_replicas": 1,
        "target_num_replicas": 1,
        "running_replicas": ["r1"],
        "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 3,
        "config": SimpleNamespace(target_ongoing_requests=8),
        "policy_state": {},
        "current_time": 100.0,
        "raw_metrics": figures,
    }
    return SimpleNamespace(**values | given)


def test_a_cold_model_stays_cold_until_somebody_asks() -> None:
    assert scale(context(current_num_replicas=0, target_num_replicas=0, running_replicas=[]))[0] == 0
    assert scale(context(current_num_replicas=0, target_num_replicas=0, total_num_requests=1))[0] == 1


def test_a_loaded_model_stays_without_requests_and_leaves_when_idle_for_too_long() -> None:
    assert scale(context(granted=3, floor=1))[0] == 1
    assert scale(context(granted=3, floor=0))[0] == 0


def test_load_adds_replicas_up_to_the_bounds() -> None:
    assert scale(context(granted=3, floor=1, total_num_requests=17))[0] == 3
    assert scale(context(granted=2, floor=1, total_num_requests=170))[0] == 2


def test_a_retired_model_goes_whatever_is_asked_of_it() -> None:
    assert scale(context(granted=0, floor=1, total_num_requests=17))[0] == 0


def test_silence_keeps_what_there_is_so_that_a_restarted_controller_ends_nobody() -> None:
    target, state = scale(context())
    assert (target, state) == (1, {"quiet_since": 100.0})
    later, _ = scale(context(policy_state=state, current_time=100 + SILENCE_S + 1))
    assert later == 1
