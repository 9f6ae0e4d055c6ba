"""The rotation on its surfaces: what GraphQL and REST show of it, and the commands for all models at once."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from serve_app.domain.catalog import ModelState
from serve_app.domain.placement import Resources
from serve_app.domain.rotation_effects import Decision
from serve_app.domain.rotation_view import FailureView, NodeView, QueueView, ResidentView, RotationView
from tests.contract.graphql_client import Graph
from tests.doubles import LocalPlatform

GB = 10**9
SHOWN = RotationView(
    nodes=(
        NodeView("n1", "huggingface", Resources(8, 1, 16 * GB), Resources(2, 1, 6 * GB), Resources(6, 0, 10 * GB), 0.5),
        NodeView("lab", "lab", Resources(*[math.inf] * 3), Resources(), Resources(*[math.inf] * 3)),
    ),
    residents=(
        ResidentView(
            "test/chat", ModelState.BUSY, ("n1", "n1"), Resources(2, 0, 6 * GB), 3, True, 1e9, 1e9 + 1, ("i1",)
        ),
    ),
    queue=(QueueView(1, "org/name:tag", "high", "me", 1500, "memory is full", 2500, ("test/chat",)),),
    history=tuple(Decision(1e9 + n, "load", f"m{n}", "asked for", ("old",), 0.25) for n in range(5)),
    failures=(
        FailureView("test/chat", "MODEL_LOAD_FAILED", "A file is missing.", 2, 1e9),
        FailureView("b", "X", "Y", 1),
    ),
    policy="cost",
    removed=("gone",),
)
QUERY = """
query Rotation($limit: Int! = 100) {
  rotation {
    enabled policy removed
    capacity { node provider total used free cpu { total used free } gpu { total used free } measured pressure }
    residents { model state nodes replicas held { cpu gpu memoryBytes } running pinned since lastUsedAt holders reason }
    queue { position model priority caller waitingMs reason etaMs evicting }
    history(limit: $limit) { at action model victims reason durationMs caller times }
    failures { model code message failures nextTry }
  }
}
"""
SET = """
mutation Set($add: [String!], $remove: [String!]) {
  setRotation(add: $add, remove: $remove) { ... on RotationChange { removed } ... on Failure { code message } }
}
"""
CLEAN = "mutation { emergencyCleanup { ... on Cleanup { evicting } ... on Failure { code } } }"


@pytest.fixture
def graph(platform: LocalPlatform) -> Graph:
    platform.router.rotation_view = SHOWN
    return Graph(platform)


async def rotation(graph: Graph, **variables: Any) -> dict[str, Any]:
    found: dict[str, Any] = (await graph.run(QUERY, **variables))["rotation"]
    return found


async def test_graphql_shows_rooms_residents_the_line_and_failures(graph: Graph):
    found = await rotation(graph)
    assert found["capacity"][0] == {
        "node": "n1",
        "provider": "huggingface",
        "total": 16 * GB,
        "used": 6 * GB,
        "free": 10 * GB,
        "cpu": {"total": 8, "used": 2, "free": 6},
        "gpu": {"total": 1, "used": 1, "free": 0},
        "measured": 0.5,
        "pressure": "calm",
    }
    assert (found["capacity"][1]["total"], found["capacity"][1]["free"]) == (None, None)  # nothing limits it
    assert found["capacity"][1]["cpu"] == {"total": None, "used": 0, "free": None}
    assert found["residents"] == [
        {
            "model": "test/chat",
            "state": "busy",
            "nodes": ["n1", "n1"],
            "replicas": 2,
            "held": {"cpu": 2, "gpu": 0, "memoryBytes": 6 * GB},
            "running": 3,
            "pinned": True,
            "since": "2001-09-09T01:46:40.000Z",
            "lastUsedAt": "2001-09-09T01:46:41.000Z",
            "holders": ["i1"],
            "reason": None,
        }
    ]
    assert found["queue"] == [
        {
            "position": 1,
            "model": "org/name:tag",
            "priority": "high",
            "caller": "me",
            "waitingMs": 1500,
            "reason": "memory is full",
            "etaMs": 2500,
            "evicting": ["test/chat"],
        }
    ]
    assert [failure["nextTry"] for failure in found["failures"]] == ["2001-09-09T01:46:40.000Z", None]
    assert (found["enabled"], found["policy"], found["removed"]) == (True, "cost", ["gone"])


async def test_the_history_is_as_long_as_it_is_asked_for(graph: Graph, platform: LocalPlatform):
    last = (await rotation(graph, limit=2))["history"]
    assert [decision["model"] for decision in last] == ["m3", "m4"]
    assert last[0] == {
        "at": "2001-09-09T01:46:43.000Z",
        "action": "load",
        "model": "m3",
        "victims": ["old"],
        "reason": "asked for",
        "durationMs": 250,
        "caller": "",
        "times": 1,
    }
    long = tuple(Decision(float(n), "load", f"m{n}", "asked for") for n in range(300))
    platform.router.rotation_view = RotationView(history=long)
    assert len((await rotation(graph))["history"]) == 100
    assert [decision["model"] for decision in (await rotation(graph, limit=299))["history"]][:1] == ["m1"]
    assert await graph.refused(QUERY, limit=0) == "INVALID_INPUT"


async def test_rest_shows_the_same(graph: Graph, api: httpx.AsyncClient):
    assert (await api.get("/api/rotation")).json() == SHOWN.to_json()
    assert len((await api.get("/api/rotation", params={"history": 2})).json()["history"]) == 2
    assert (await api.get("/api/rotation", params={"history": 0})).json()["history"] == []
    for wrong in ("-1", "x", "501", "99999999"):
        refused = await api.get("/api/rotation", params={"history": wrong})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "INVALID_INPUT")


async def test_models_are_taken_out_of_the_pool_and_into_it(graph: Graph, api: httpx.AsyncClient):
    assert (await graph.run(SET, remove=["org/name:tag", "test/chat"]))["setRotation"] == {
        "removed": ["org/name:tag", "test/chat"]
    }
    assert (await graph.run(SET, add=["test/chat"]))["setRotation"] == {"removed": ["org/name:tag"]}
    assert (await graph.run(SET))["setRotation"] == {"removed": ["org/name:tag"]}
    answer = await api.post("/api/rotation", json={"add": ["org/name:tag"], "remove": ["test/chat"]})
    assert answer.json() == {"removed": ["test/chat"]}


async def test_an_unknown_model_changes_nothing(graph: Graph, platform: LocalPlatform, api: httpx.AsyncClient):
    refused = (await graph.run(SET, remove=["test/chat", "nobody"]))["setRotation"]
    assert refused["code"] == "MODEL_NOT_FOUND" and "nobody" in refused["message"]
    answer = await api.post("/api/rotation", json={"remove": ["nobody"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "MODEL_NOT_FOUND")
    assert platform.router.removed == set()


@pytest.mark.parametrize("body", [{"add": "test/chat"}, {"drop": []}, [], {"remove": [5]}])
async def test_a_change_of_a_wrong_shape_is_refused(api: httpx.AsyncClient, body: Any):
    answer = await api.post("/api/rotation", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "INVALID_INPUT")


async def test_a_cleanup_tells_which_models_leave(graph: Graph, platform: LocalPlatform, api: httpx.AsyncClient):
    await graph.run('mutation { pinModel(model: "test/chat") { __typename } }')
    assert (await graph.run(CLEAN))["emergencyCleanup"] == {"evicting": ["org/name:tag"]}
    assert (await api.post("/api/rotation/cleanup")).json() == {"evicting": ["org/name:tag"]}
    states = {status.name: status.state for status in (await platform.router.view()).models}
    assert states == {"test/chat": ModelState.READY, "org/name:tag": ModelState.COLD}


async def test_commands_need_a_post(api: httpx.AsyncClient):
    assert (await api.get("/api/rotation/cleanup")).status_code == 405
    refused = await api.get("/graphql", params={"query": CLEAN})
    assert refused.status_code == 405
