from typing import Any

import pytest

from serve_app.domain.catalog import Capability, Catalogue, Entry, ModelInfo, ModelState, application_name
from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    InvalidInput,
    ModelLoadFailed,
    ModelNotFound,
    ModelUnsafe,
)
from serve_app.domain.fleet import REPORT_TTL_S, Fleet, Report
from serve_app.domain.generation import GenerationRequest, Message, Role
from serve_app.domain.prompt_length import LONGEST_TOKEN, least_tokens
from serve_app.domain.routing import Ask, choose

CHAT = frozenset({Capability.CHAT})
VISION = frozenset({Capability.CHAT, Capability.VISION})


def entry(model_id: str, able: frozenset[Capability] = CHAT, **info: Any) -> Entry:
    described = ModelInfo(model_id, "", capabilities=able, **info)
    return Entry(model_id, "huggingface", application_name(model_id), "model", described)


def report(model_id: str, state: ModelState = ModelState.READY, replica: str = "r1", **more: Any) -> Report:
    return Report(application_name(model_id), replica, state, **more)


def test_the_model_that_was_asked_for_comes_first_then_the_fallbacks_in_their_order() -> None:
    catalogue = Catalogue([entry("a"), entry("b"), entry("c")])
    route = choose(Ask("t", "b", fallbacks=("c", "a")), catalogue, Fleet().at(0))
    assert [candidate.name for candidate in route.candidates] == ["b", "c", "a"]
    assert [candidate.reason for candidate in route.candidates] == [
        "the model that was asked for, cold",
        "fallback 1, cold",
        "fallback 2, cold",
    ]


def test_fallbacks_in_memory_go_before_cold_ones_but_never_before_what_was_asked_for() -> None:
    fleet = Fleet()
    fleet.hear(report("c"), 0)
    fleet.hear(report("d"), 0)
    catalogue = Catalogue([entry(name) for name in "abcd"])
    route = choose(Ask("t", "a", fallbacks=("b", "d", "c")), catalogue, fleet.at(0))
    assert [candidate.name for candidate in route.candidates] == ["a", "d", "c", "b"]
    assert route.candidates[1].reason == "fallback 2, ready"


def test_of_several_models_under_one_name_the_one_in_memory_answers_then_the_one_that_answers_soonest() -> None:
    fleet = Fleet()
    # A mean reply of 2 s and nobody there; one of 1 s, and three before this one; one that was never asked; a cold one.
    fleet.hear(report("slow", requests=5, busy_seconds=10.0), 0)
    fleet.hear(report("busy", ModelState.BUSY, requests=8, running=2, waiting=1, busy_seconds=5.0), 0)
    fleet.hear(report("new"), 0)
    catalogue = Catalogue(
        [entry(name) for name in ("slow", "busy", "new", "cold")], {"any": ("cold", "slow", "busy", "new")}
    )
    route = choose(Ask("t", "any", fallbacks=("slow",)), catalogue, fleet.at(0))
    assert [candidate.name for candidate in route.candidates] == ["new", "slow", "busy", "cold"]
    assert route.momentary and not route.passed_over
    assert (fleet.expected_s(entry("slow"), 0), fleet.expected_s(entry("busy"), 0)) == (2.0, 4.0)


def test_one_of_several_that_cannot_do_it_is_left_out_and_all_of_them_is_an_error() -> None:
    catalogue = Catalogue([entry("text"), entry("eyes", VISION)], {"any": ("text", "eyes")})
    assert [one.name for one in choose(Ask("t", "any", VISION), catalogue, Fleet().at(0)).candidates] == ["eyes"]
    with pytest.raises(CapabilityMissing):
        choose(Ask("t", "any", frozenset({Capability.TOOLS})), catalogue, Fleet().at(0))


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_called_and_skips_such_fallbacks() -> None:
    catalogue = Catalogue([entry("short", context_length=8), entry("long", context_length=80), entry("unknown")])
    with pytest.raises(ContextLengthExceeded) as caught:
        choose(Ask("t", "short", least_tokens=8), catalogue, Fleet().at(0))
    assert caught.value.details == {"leastTokens": 8, "contextLength": 8}
    ask = Ask("t", "long", fallbacks=("short", "unknown"), least_tokens=8)
    route = choose(ask, catalogue, Fleet().at(0))
    assert ([candidate.name for candidate in route.candidates], route.momentary) == (["long", "unknown"], True)
    assert route.takes(79) and not route.takes(80)
    whole = choose(Ask("t", "long", fallbacks=("short", "unknown"), least_tokens=7), catalogue, Fleet().at(0))
    assert (len(whole.candidates), whole.momentary) == (3, False)


def test_a_prompt_has_a_token_for_each_word_at_least_and_counts_only_what_must_stay() -> None:
    said = [(Role.SYSTEM, "be brief"), (Role.USER, "one two three"), (Role.ASSISTANT, "four"), (Role.USER, "a  b\nc")]
    messages = tuple(Message.of(role, text) for role, text in said)
    assert least_tokens(GenerationRequest("r", "m", messages, context_policy="error")) == 9
    assert least_tokens(GenerationRequest("r", "m", messages, context_policy="truncate")) == 5
    long = GenerationRequest("r", "m", (Message.of(Role.USER, "x" * (2 * LONGEST_TOKEN + 1)),))
    assert least_tokens(long) == 3


def test_without_a_name_the_default_answers_or_the_only_chat_model() -> None:
    catalogue = Catalogue([entry("a"), entry("embed", frozenset({Capability.EMBEDDINGS}))])
    assert choose(Ask("t", None), catalogue, Fleet().at(0)).first.name == "a"
    both = Catalogue([entry("a"), entry("b")])
    assert choose(Ask("t", None), both, Fleet().at(0), "b").first.name == "b"
    with pytest.raises(InvalidInput, match="name one of: a, b"):
        choose(Ask("t", None), both, Fleet().at(0))


def test_a_missing_capability_is_refused_before_anything_is_called_and_the_able_are_named() -> None:
    catalogue = Catalogue([entry("text"), entry("eyes", VISION)])
    with pytest.raises(CapabilityMissing) as caught:
        choose(Ask("t", "text", VISION), catalogue, Fleet().at(0))
    assert caught.value.details == {"missing": ["vision"], "capable": ["eyes"]}


def test_an_unusable_model_is_refused_with_its_own_code_and_reason() -> None:
    catalogue = Catalogue([entry("bad", problem="the weights are pickled", problem_code="MODEL_UNSAFE")])
    with pytest.raises(ModelUnsafe, match="pickled"):
        choose(Ask("t", "bad"), catalogue, Fleet().at(0))


def test_an_unusable_model_gives_way_to_its_fallback() -> None:
    catalogue = Catalogue([entry("bad", problem="truncated", problem_code="MODEL_LOAD_FAILED"), entry("good")])
    assert choose(Ask("t", "bad", fallbacks=("good",)), catalogue, Fleet().at(0)).first.name == "good"


def test_a_wrong_name_is_not_hidden_by_a_fallback() -> None:
    with pytest.raises(ModelNotFound):
        choose(Ask("t", "typo", fallbacks=("a",)), Catalogue([entry("a")]), Fleet().at(0))


def test_a_failed_load_is_remembered_until_the_files_change() -> None:
    fleet, failure = Fleet(), ModelLoadFailed("tensors are missing").to_dict()
    fleet.hear(report("a", ModelState.FAILED, failure=failure), 0, revision="v1")
    assert fleet.state_of(entry("a", revision="v1"), 100) == (ModelState.FAILED, "tensors are missing")
    with pytest.raises(ModelLoadFailed, match="tensors are missing"):
        choose(Ask("t", "a"), Catalogue([entry("a", revision="v1")]), fleet.at(100))
    assert choose(Ask("t", "a"), Catalogue([entry("a", revision="v2")]), fleet.at(100)).first.name == "a"


def test_a_failed_load_that_may_heal_is_tried_again() -> None:
    fleet, failure = Fleet(), ModelLoadFailed("the disk did not answer", retryable=True).to_dict()
    fleet.hear(report("a", ModelState.FAILED, failure=failure), 0)
    assert choose(Ask("t", "a"), Catalogue([entry("a")]), fleet.at(0)).first.name == "a"


def test_the_busiest_word_of_the_replicas_is_the_models_state() -> None:
    fleet = Fleet()
    fleet.hear(report("a", ModelState.LOADING, "r1"), 0)
    assert fleet.state_of(entry("a"), 0)[0] is ModelState.LOADING
    fleet.hear(report("a", ModelState.READY, "r2"), 0)
    assert fleet.state_of(entry("a"), 0)[0] is ModelState.READY
    fleet.hear(report("a", ModelState.BUSY, "r1", running=1), 0)
    assert fleet.state_of(entry("a"), 0)[0] is ModelState.BUSY


def test_a_report_that_was_overtaken_is_not_believed() -> None:
    fleet = Fleet()
    fleet.hear(report("a", ModelState.READY, number=2), 0)
    fleet.hear(report("a", ModelState.LOADING, number=1), 0)
    assert fleet.state_of(entry("a"), 0)[0] is ModelState.READY


def test_a_silent_replica_is_gone_and_a_farewell_is_believed_at_once() -> None:
    fleet = Fleet()
    fleet.hear(report("a"), 0)
    assert fleet.state_of(entry("a"), REPORT_TTL_S)[0] is ModelState.READY
    assert fleet.state_of(entry("a"), REPORT_TTL_S + 0.1)[0] is ModelState.COLD
    fleet.hear(report("a"), 10)
    fleet.forget(application_name("a"), "r1")
    assert fleet.state_of(entry("a"), 10)[0] is ModelState.COLD


def test_a_load_that_was_asked_for_counts_as_loading_until_a_replica_speaks() -> None:
    fleet = Fleet()
    fleet.expect(application_name("a"), 0)
    assert fleet.state_of(entry("a"), 1)[0] is ModelState.LOADING
    fleet.hear(report("a"), 2)
    assert fleet.state_of(entry("a"), 2)[0] is ModelState.READY
    fleet.expect(application_name("b"), 0)
    fleet.prune(61)
    assert fleet.state_of(entry("b"), 61)[0] is ModelState.COLD


def test_the_view_adds_up_what_the_replicas_say() -> None:
    fleet = Fleet()
    fleet.hear(report("a", replica="r1", requests=3, running=1, busy_seconds=2, memory_bytes=10, pid=7), 0)
    fleet.hear(report("a", replica="r2", requests=2, busy_seconds=2, memory_bytes=5, pid=8), 0)
    shown = fleet.view(Catalogue([entry("a")]), 0).models[0].to_json()
    assert (shown["requestCount"], shown["running"], shown["memoryBytes"], shown["pids"]) == (5, 1, 15, [7, 8])
    assert shown["averageResponseMs"] == 1000
    assert shown["replicas"] == 2
