"""The policy that Serve's controller runs, on contexts as Serve makes them."""

from types import SimpleNamespace
from typing import Any

from deployments.autoscaling import CALM_S, SILENCE_S, scale


def context(**given: Any) -> Any:
    granted = given.pop("granted", {})
    by_replica = granted if isinstance(granted, dict) else {"r1": granted}
    figures = {replica: [SimpleNamespace(timestamp=0, value=value)] for replica, value in by_replica.items()}
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
        "raw_metrics": {"granted": figures} if figures else {},
    }
    return SimpleNamespace(**values | given)


def test_a_cold_model_stays_cold_until_somebody_asks() -> None:
    assert scale(context(current_num_replicas=0, target_num_replicas=0, running_replicas=[]))[0] == 0
    assert scale(context(current_num_replicas=0, target_num_replicas=0, total_num_requests=1))[0] == 1


def test_a_loaded_model_stays_without_requests() -> None:
    assert scale(context(granted=3))[0] == 1


def test_load_adds_replicas_up_to_what_is_granted_and_to_the_bounds() -> None:
    assert scale(context(granted=3, total_num_requests=17))[0] == 3
    assert scale(context(granted=2, total_num_requests=170))[0] == 2
    assert scale(context(granted=9, total_num_requests=170))[0] == 3


def test_a_retired_model_goes_whatever_is_asked_of_it() -> None:
    assert scale(context(granted=0, total_num_requests=17))[0] == 0
    assert scale(context(granted={"r1": 2, "r2": 0}, total_num_requests=17, current_num_replicas=2))[0] == 0


def test_fewer_replicas_are_run_only_when_fewer_were_enough_for_a_while() -> None:
    two: dict[str, Any] = {"granted": 2, "current_num_replicas": 2, "target_num_replicas": 2}
    target, state = scale(context(**two, total_num_requests=3))
    assert target == 2
    target, state = scale(context(**two, total_num_requests=0, policy_state=state, current_time=100 + CALM_S - 1))
    assert target == 2
    assert scale(context(**two, total_num_requests=9, policy_state=state, current_time=100 + CALM_S))[1] == {}
    assert scale(context(**two, total_num_requests=3, policy_state=state, current_time=100 + CALM_S))[0] == 1


def test_silence_keeps_what_there_is_so_that_a_restarted_controller_ends_nobody() -> None:
    target, state = scale(context())
    assert (target, state) == (1, {"quiet_since": 100.0})
    later, _ = scale(context(policy_state=state, current_time=100 + SILENCE_S + 1))
    assert later == 1
