"""GraphQL about the fleet, against the running product: the rotation, its commands, and providers in trouble."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.cluster import Cluster, wait_until
from tests.ollama_server import nothing_listens
from tests.serve.test_remote_providers import upstream

ROTATION = """{ rotation {
  capacity { node total used free }
  residents { model state replicas held { memoryBytes } running pinned }
  queue { position model priority waitingMs reason }
  history(limit: 20) { at action model victims reason durationMs }
  failures { model code message }
} }"""
RESULT = "{ __typename ... on ModelChange { model state } ... on Failure { code message } }"
MODELS = "{ availableModels { models providers { name status error modelCount } } }"


def run(cluster: Cluster, query: str, **variables: Any) -> dict[str, Any]:
    answer = httpx.post(f"{cluster.url}/graphql", json={"query": query, "variables": variables}, timeout=60).json()
    assert "errors" not in answer, answer
    return dict(answer["data"])


def test_the_rotation_is_shown_and_changed(cluster: Cluster) -> None:
    loaded = run(cluster, f'mutation {{ loadModel(model: "test/scripted") {RESULT} }}')["loadModel"]
    assert loaded["__typename"] == "ModelChange"
    wait_until(lambda: cluster.model("test/scripted")["state"] == "ready", what="the model to be loaded")
    rotation = run(cluster, ROTATION)["rotation"]
    assert any(node["total"] and node["free"] is not None for node in rotation["capacity"])
    assert "test/scripted" in [resident["model"] for resident in rotation["residents"]]
    assert [decision for decision in rotation["history"] if decision["model"] == "test/scripted"]
    plan = run(cluster, '{ plan(model: "test/scripted") { ... on Plan { verdict demand { cpu } } } }')["plan"]
    assert plan["verdict"] == "resident"


def test_a_model_that_is_taken_out_of_the_pool_is_offered_no_more_until_it_is_back(cluster: Cluster) -> None:
    change = "mutation($add: [String!], $remove: [String!]) { setRotation(add: $add, remove: $remove) { __typename } }"
    assert run(cluster, change, remove=["test/scripted"])["setRotation"]["__typename"] == "RotationChange"
    try:
        assert "test/scripted" not in run(cluster, MODELS)["availableModels"]["models"]
        refused = run(cluster, f'mutation {{ loadModel(model: "test/scripted") {RESULT} }}')["loadModel"]
        assert refused["code"] == "MODEL_NOT_FOUND"
    finally:
        run(cluster, change, add=["test/scripted"])
    assert "test/scripted" in run(cluster, MODELS)["availableModels"]["models"]


def test_a_cleanup_names_the_idle_models_and_they_go(cluster: Cluster) -> None:
    run(cluster, f'mutation {{ loadModel(model: "test/scripted") {RESULT} }}')
    wait_until(lambda: cluster.model("test/scripted")["state"] == "ready", what="the model to be loaded")
    clean = "mutation { emergencyCleanup { ... on Cleanup { evicting } } }"
    assert "test/scripted" in run(cluster, clean)["emergencyCleanup"]["evicting"]
    wait_until(lambda: cluster.model("test/scripted")["state"] == "cold", what="the model to be cold")


@contextmanager
def dead_provider(cluster: Cluster) -> Iterator[None]:
    with nothing_listens() as nowhere:
        added = upstream("gone", nowhere)
        cluster.config["applications"].append(added)
        cluster.deploy()
        try:
            yield
        finally:
            cluster.config["applications"].remove(added)
            cluster.deploy()


def providers(cluster: Cluster) -> dict[str, dict[str, Any]]:
    started = time.monotonic()
    found = run(cluster, MODELS)["availableModels"]
    assert time.monotonic() - started < 2
    assert {"rotunda/tiny-chat", "rotunda/tiny-vision", "test/scripted"} <= set(found["models"])
    return {provider["name"]: provider for provider in found["providers"]}


def test_what_cannot_be_asked_says_so_and_hides_no_other(cluster: Cluster) -> None:
    """A provider that is down, the model store away, and both: the query succeeds within 2 s."""
    with dead_provider(cluster):
        wait_until(lambda: providers(cluster).get("gone", {}).get("error"), 60, what="the provider's error")
        seen = providers(cluster)
        assert (seen["gone"]["status"], seen["huggingface"]["status"]) == ("error", "ok")
        elsewhere = cluster.models.rename(cluster.home / "models-away")
        try:
            wait_until(lambda: providers(cluster)["huggingface"]["error"], 30, what="the store's error")
            seen = providers(cluster)
            assert (seen["gone"]["status"], seen["huggingface"]["status"]) == ("error", "error")
            assert "cannot be listed" in seen["huggingface"]["error"] and seen["huggingface"]["modelCount"] >= 2
        finally:
            elsewhere.rename(cluster.models)
    wait_until(lambda: providers(cluster)["huggingface"]["status"] == "ok", 30, what="the store to be back")
