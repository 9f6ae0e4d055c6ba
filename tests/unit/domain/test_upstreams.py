"""What the router knows of remote providers, from the reports of their replicas."""

from __future__ import annotations

from serve_app.domain.catalog import Capability, Catalogue, ModelInfo, ModelState
from serve_app.domain.errors import ProviderUnavailable
from serve_app.domain.fleet import REPORT_TTL_S, Fleet
from serve_app.domain.upstreams import UpstreamReport, Upstreams, Use, put_up_and_take_down

CHAT = frozenset({Capability.CHAT})
INFOS = (ModelInfo("a:1b", "", capabilities=CHAT), ModelInfo("b:1b", "", capabilities=CHAT))
APPLICATION = "upstream-lab"


def report(**more: object) -> UpstreamReport:
    given = {"revision": "1", "models": INFOS, "residents": {"a:1b": 500}, **more}
    return UpstreamReport("lab", "ollama", APPLICATION, "replica", 7, **given)  # type: ignore[arg-type]


def heard(*reports: UpstreamReport, at: float = 0.0) -> Upstreams:
    upstreams = Upstreams()
    for each in reports:
        upstreams.hear(each, at)
    return upstreams


def fleet_of(upstreams: Upstreams, at: float = 0.0) -> tuple[Catalogue, Fleet]:
    catalogue, fleet = Catalogue(upstreams.entries("lab", APPLICATION, True, at)), Fleet()
    for each in upstreams.model_reports(catalogue.entries, APPLICATION, at):
        fleet.hear(each, at)
    return catalogue, fleet


def test_models_of_one_application_have_states_and_memory_of_their_own() -> None:
    catalogue, fleet = fleet_of(heard(report(uses={"b:1b": Use(running=1, requests=2)})))
    view = fleet.view(catalogue, 0.0)
    found = {each.name: each.to_json() for each in view.models}
    assert (found["a:1b"]["state"], found["a:1b"]["memoryBytes"]) == ("ready", 500)
    assert (found["b:1b"]["state"], found["b:1b"]["memoryBytes"]) == ("loading", None)
    assert (found["a:1b"]["requestCount"], found["b:1b"]["requestCount"]) == (0, 2)


def test_a_model_that_is_used_is_busy_and_one_that_is_not_resident_is_cold() -> None:
    busy = report(uses={"a:1b": Use(running=1)})
    assert (busy.state_of("a:1b"), busy.state_of("b:1b")) == (ModelState.BUSY, ModelState.COLD)


def test_a_server_that_does_not_tell_its_residency_has_all_models_ready() -> None:
    assert report(residents=None).state_of("b:1b") is ModelState.READY


def test_the_list_is_asked_for_again_until_it_is_known() -> None:
    upstreams = Upstreams()
    assert upstreams.hear(report(models=None), 0.0) is False
    assert upstreams.hear(report(), 0.0) is True
    assert upstreams.hear(report(models=None), 1.0) is True
    assert upstreams.hear(report(models=None, revision="2"), 2.0) is False


def test_a_provider_that_cannot_be_asked_keeps_its_models_with_the_reason() -> None:
    down = report(models=None, error=ProviderUnavailable("lab cannot be reached.").to_dict())
    upstreams = heard(report(), down)
    catalogue, fleet = fleet_of(upstreams)
    state, reason = fleet.state_of(catalogue.resolve("a:1b"), 0.0)
    assert (state, reason) == (ModelState.UNAVAILABLE, "lab cannot be reached.")
    status = upstreams.status("lab", "ollama", APPLICATION, 0.0)
    assert (status.status, status.model_count, status.error) == ("error", 0, "lab cannot be reached.")


def test_a_silent_upstream_is_an_error_and_one_living_replica_is_enough() -> None:
    upstreams = heard(report())
    assert upstreams.problem(APPLICATION, REPORT_TTL_S) is None
    assert "does not answer" in str(upstreams.problem(APPLICATION, REPORT_TTL_S + 1))
    second = UpstreamReport("lab", "ollama", APPLICATION, "second", 8, "1", None, None, {}, {"message": "down"})
    upstreams.hear(second, 0.0)
    assert upstreams.problem(APPLICATION, 0.0) is None
    upstreams.forget(APPLICATION, "replica")
    assert upstreams.problem(APPLICATION, 0.0) == "down"


def test_a_provider_that_is_configured_no_more_is_taken_down_and_a_changed_one_put_up_anew() -> None:
    standing = {"upstream-a": "1", "upstream-b": "1", "upstream-c": "1", "upstream-d": "1"}
    running = {"upstream-a", "upstream-b", "upstream-c", "upstream-d", "upstream-e", "model-x"}
    wanted = {"upstream-a": "1", "upstream-b": "2", "upstream-e": "1", "upstream-new": "1"}
    # d was declared in serve_config.yaml meanwhile, e runs since before anybody kept its arguments.
    missing, stale = put_up_and_take_down(wanted, standing, running, {"upstream-d"})
    assert (missing, stale) == ({"upstream-b", "upstream-new"}, {"upstream-c"})
    assert put_up_and_take_down(wanted, {}, set(), ())[0] == wanted.keys()
