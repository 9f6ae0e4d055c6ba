"""Models by name, and the commands to the router."""

from __future__ import annotations

import pytest

from serve_app.domain.catalog import ModelState
from tests.contract.graphql_client import Graph
from tests.doubles import LocalPlatform

RESULT = "{ __typename ... on ModelChange { model state reason } ... on Failure { code message retryable traceId } }"


@pytest.fixture
def graph(platform: LocalPlatform) -> Graph:
    return Graph(platform)


async def command(graph: Graph, name: str, model: str, more: str = "") -> dict[str, str]:
    document = f"mutation($model: String!) {{ {name}(model: $model{more}) {RESULT} }}"
    answer: dict[str, str] = (await graph.run(document, model=model))[name]
    return answer


@pytest.mark.parametrize("name", ["org/name:tag", "huggingface/org/name:tag"])
async def test_a_model_by_any_of_its_names(graph: Graph, name: str):
    found = await graph.run("query($name: String!) { model(name: $name) { name id provider state } }", name=name)
    assert found["model"] == {
        "name": "org/name:tag",
        "id": "org/name:tag",
        "provider": "huggingface",
        "state": "ready",
    }


async def test_an_unknown_model_is_told_with_the_nearest_names(graph: Graph):
    answer = await graph.answer('{ model(name: "test/chap") { id } }')
    extensions = answer["errors"][0]["extensions"]
    assert extensions["code"] == "MODEL_NOT_FOUND" and extensions["details"] == {"suggestions": ["test/chat"]}


async def test_models_are_loaded_and_unloaded(graph: Graph, platform: LocalPlatform):
    assert (await command(graph, "unloadModel", "test/chat"))["state"] == "cold"
    assert (await command(graph, "loadModel", "test/chat"))["state"] == "ready"
    platform.router.put("test/chat", ModelState.COLD)
    warmed = await command(graph, "warmup", "test/chat")
    assert (warmed["__typename"], warmed["model"], warmed["state"]) == ("ModelChange", "test/chat", "ready")


async def test_a_model_is_pinned_and_released(graph: Graph):
    async def pinned() -> bool:
        answer = await graph.run('{ model(name: "test/chat") { pinned } }')
        return bool(answer["model"]["pinned"])

    await command(graph, "pinModel", "test/chat")
    assert await pinned()
    await command(graph, "pinModel", "test/chat", ", pinned: false")
    assert not await pinned()


@pytest.mark.parametrize("name", ["loadModel", "unloadModel", "pinModel", "warmup"])
async def test_a_command_for_an_unknown_model_is_a_typed_failure(graph: Graph, name: str):
    answer = await command(graph, name, "no/such")
    assert (answer["__typename"], answer["code"], answer["retryable"]) == ("Failure", "MODEL_NOT_FOUND", False)
    assert len(answer["traceId"]) == 32


async def test_a_plan_changes_nothing(graph: Graph, platform: LocalPlatform):
    platform.router.put("test/chat", ModelState.COLD)
    query = """query($model: String!) { plan(model: $model) { __typename
      ... on Plan { model verdict evicts parts { name bytes } etaMs } ... on Failure { code } } }"""
    plan = (await graph.run(query, model="test/chat"))["plan"]
    assert (plan["__typename"], plan["model"], plan["verdict"], plan["evicts"]) == ("Plan", "test/chat", "fits", [])
    assert (await graph.run('{ model(name: "test/chat") { state } }'))["model"]["state"] == "cold"
    assert (await graph.run(query, model="no/such"))["plan"] == {"__typename": "Failure", "code": "MODEL_NOT_FOUND"}
