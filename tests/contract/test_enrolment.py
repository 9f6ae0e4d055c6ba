"""What the rotation is told of the memory of remote providers."""

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.enrolment import JUST_MOVED_S, Enrolment
from serve_app.domain.catalog import ModelState
from serve_app.domain.rotation_events import Gone, Heartbeat

ENTRY = SimpleNamespace(
    full_name="lab/b", id="b", unit="lab/b", application="upstream-lab", provider="lab", shared=True
)


def told(*, listed: bool, resident: Any, left_at: float = float("-inf"), now: float = 100.0) -> list[Any]:
    """What is told when the server's own list names the model or not."""
    events: list[Any] = []
    row = SimpleNamespace(model=SimpleNamespace(resides=True), left_at=left_at)
    residency = SimpleNamespace(rows={"lab/b": row}, residents={"lab/b": resident} if resident else {})
    rotor = SimpleNamespace(
        now=now, tell=events.append, rotation=SimpleNamespace(state=SimpleNamespace(residency=residency))
    )
    report = SimpleNamespace(
        residents={"b"} if listed else set(), of=lambda _: SimpleNamespace(running=0, memory_bytes=7)
    )
    offer = SimpleNamespace(by_name={"lab/b": ENTRY}, remotes=SimpleNamespace(reports=lambda *_: [report]))
    settings = SimpleNamespace(max_concurrent_models=2)
    Enrolment(offer, rotor, settings, SimpleNamespace(), {}).residents("upstream-lab")  # type: ignore[arg-type]
    return events


def test_a_model_that_others_loaded_is_told_of() -> None:
    assert told(listed=True, resident=None) == [Heartbeat("lab/b", "upstream-lab", "lab", ModelState.READY, 0, 7)]


@pytest.mark.parametrize(("ago", "found"), [(0.0, False), (JUST_MOVED_S, False), (JUST_MOVED_S + 0.1, True)])
def test_a_list_from_before_a_model_left_does_not_bring_it_back(ago: float, found: bool) -> None:
    assert bool(told(listed=True, resident=None, left_at=100.0 - ago)) == found


@pytest.mark.parametrize(("ago", "gone"), [(0.0, False), (JUST_MOVED_S, False), (JUST_MOVED_S + 0.1, True)])
def test_a_list_from_before_a_model_came_does_not_take_it_away(ago: float, gone: bool) -> None:
    resident = SimpleNamespace(loaded_at=100.0 - ago)
    assert told(listed=False, resident=resident) == ([Gone("lab/b", "upstream-lab")] if gone else [])
