"""Circuit breakers: when they open, when they let a try pass, and whom they blame."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.domain.breaker import CLOSED, Breakers, Circuit, Rules
from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.errors import (
    CapabilityMissing,
    DeadlineExceeded,
    ProviderError,
    ProviderUnavailable,
    QueueFull,
    RotundaError,
)
from serve_app.domain.routing import Candidate

RULES = Rules(threshold=3, timeout_s=10)
A, B = (Entry(name, "lab", "upstream-lab", "upstream") for name in ("a", "b"))
LOCAL = Entry("org/c", "huggingface", "model-c", "model")


def candidate(entry: Entry) -> Candidate:
    return Candidate(entry, entry.id, ModelState.READY, "asked for")


def breakers(entry: Entry, error: RotundaError, times: int = 3) -> Breakers:
    made = Breakers(RULES)
    for _ in range(times):
        made.failed(entry, error, now=0)
    return made


def test_it_opens_after_as_many_failures_in_a_row_as_the_threshold_says() -> None:
    breaker = CLOSED.failed(0, RULES).failed(1, RULES)
    assert breaker.state(1, RULES) is Circuit.CLOSED
    breaker = breaker.failed(2, RULES)
    assert breaker.state(2, RULES) is Circuit.OPEN
    assert breaker.retry_in_s(2, RULES) == 10


def test_answers_that_break_together_are_one_failure() -> None:
    """The death of a replica breaks all its answers, and says no more than the first of them."""
    made, broke = Breakers(RULES), ProviderUnavailable("it is gone")
    for begun in (1.0, 2.0, 3.0, 4.0):
        made.failed(LOCAL, broke, now=5.0, speaking_since=begun)
    assert made.state(LOCAL, 5.0) is Circuit.CLOSED
    # What began after that failed by itself, and so does a call that gets no word out.
    made.failed(LOCAL, broke, now=6.0, speaking_since=5.5)
    made.failed(LOCAL, broke, now=6.0)
    assert made.state(LOCAL, 6.0) is Circuit.OPEN


def test_after_its_time_one_try_passes_and_a_failure_opens_it_at_once_again() -> None:
    breaker = CLOSED.failed(0, RULES).failed(0, RULES).failed(0, RULES)
    assert breaker.state(9.9, RULES) is Circuit.OPEN
    assert breaker.state(10, RULES) is Circuit.HALF_OPEN
    trying = breaker.tried(10)
    assert trying.state(11, RULES) is Circuit.OPEN
    assert trying.failed(11, RULES).state(20.9, RULES) is Circuit.OPEN
    assert trying.failed(11, RULES).state(21, RULES) is Circuit.HALF_OPEN


def test_a_try_that_ends_without_a_word_lets_the_next_one_pass() -> None:
    trying = CLOSED.failed(0, RULES).failed(0, RULES).failed(0, RULES).tried(10)
    assert trying.released().state(11, RULES) is Circuit.HALF_OPEN
    assert trying.state(20, RULES) is Circuit.HALF_OPEN


def test_a_success_forgets_all_failures() -> None:
    made = breakers(A, ProviderError("500"), times=2)
    made.succeeded(A)
    made.failed(A, ProviderError("500"), now=0)
    assert made.state(A, 0) is Circuit.CLOSED


def test_a_provider_that_cannot_be_reached_closes_the_way_to_all_its_models() -> None:
    made = breakers(A, ProviderUnavailable("down"))
    assert (made.state(A, 0), made.state(B, 0), made.state(LOCAL, 0)) == ("open", "open", "closed")
    assert repr(made) == "Breakers(opened=['upstream-lab'])"


def test_a_model_that_answers_badly_is_blamed_alone() -> None:
    made = breakers(A, ProviderError("the answer broke off"))
    assert (made.state(A, 0), made.state(B, 0)) == (Circuit.OPEN, Circuit.CLOSED)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (DeadlineExceeded.during("connect", 5), Circuit.OPEN),
        (DeadlineExceeded.during("first token", 5), Circuit.OPEN),
        (DeadlineExceeded.during("idle", 5), Circuit.OPEN),
        (DeadlineExceeded.during("total", 5), Circuit.CLOSED),
        (CapabilityMissing("no images"), Circuit.CLOSED),
        (QueueFull("later"), Circuit.CLOSED),
    ],
)
def test_only_what_speaks_of_health_counts(error: RotundaError, state: Circuit) -> None:
    assert breakers(A, error).state(A, 0) is state


def test_healthy_candidates_come_before_tries_and_closed_ways_are_left_out() -> None:
    made = breakers(A, ProviderError("500"))
    assert made.order([candidate(A), candidate(LOCAL)], 0) == (candidate(LOCAL),)
    assert made.order([candidate(A), candidate(LOCAL)], 10) == (candidate(LOCAL), candidate(A))
    made.succeeded(A)
    assert made.order([candidate(A), candidate(LOCAL)], 10) == (candidate(A), candidate(LOCAL))


def test_when_every_way_is_closed_the_refusal_says_when_to_come_again() -> None:
    made = breakers(A, ProviderUnavailable("down"))
    with pytest.raises(ProviderUnavailable, match="a, b failed several times in a row") as caught:
        made.order([candidate(A), candidate(B)], 4)
    assert (caught.value.retry_after_s, caught.value.provider) == (6, "lab")


def test_only_one_request_at_a_time_tries_a_half_open_way() -> None:
    made = breakers(A, ProviderUnavailable("down"))
    assert made.order([candidate(A)], 10)
    made.tried(A, 10)
    with pytest.raises(ProviderUnavailable):
        made.order([candidate(B)], 11)
    made.succeeded(A)
    assert made.order([candidate(B)], 11)


@given(st.lists(st.sampled_from(["fail", "succeed", "try", "release", "wait"]), max_size=60))
def test_no_way_stays_closed_for_ever(steps: list[str]) -> None:
    made, now = Breakers(RULES), 0.0
    for step in steps:
        match step:
            case "fail":
                made.failed(A, ProviderUnavailable("down"), now)
            case "succeed":
                made.succeeded(A)
            case "try":
                made.tried(A, now)
            case "release":
                made.released(A)
            case _:
                now += 3
        assert 0 <= made.retry_in_s(A, now) <= RULES.timeout_s
    assert made.state(A, now + RULES.timeout_s) in (Circuit.CLOSED, Circuit.HALF_OPEN)
