"""What a client learns when something goes wrong, and what it never learns."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from serve_app.domain.errors import ProviderUnavailable
from tests.contract.graphql_client import EVENTS, SEND, Graph, subscribe, websocket
from tests.doubles import LocalPlatform

SECRET = "postgresql://rotunda:hunter2@db/rotunda"


@pytest.fixture
def broken(platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """A platform whose store fails with a secret in the words of its error."""

    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"could not connect to {SECRET}")

    for method in ("get_conversation", "list_conversations", "get_session", "create_conversation"):
        monkeypatch.setattr(platform.services.store, method, fail)
    return Graph(platform)


@pytest.mark.parametrize(
    "document",
    [
        "{ conversations { count } }",
        '{ conversation(id: "c1") { id } }',
        '{ streamSession(id: "s1") { id } }',
        'mutation { createConversation(input: {id: "c1", tabName: "t"}) { message } }',
        'mutation { sendMessage(input: {conversationId: "c1", message: "m"}) { __typename } }',
        'mutation { deleteConversation(conversationId: "c1") { success } }',
        'mutation { terminateStream(input: {sessionId: "s", conversationId: "c1"}) { success } }',
    ],
)
async def test_a_fault_is_masked_and_logged(broken: Graph, document: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        response = await broken.post({"query": document})
    assert SECRET not in response.text and "hunter2" not in response.text
    answer = response.json()
    (error,) = answer["errors"]
    assert error["extensions"]["code"] == "INTERNAL" and error["extensions"]["retryable"] is False
    trace_id = error["extensions"]["traceId"]
    assert trace_id == answer["extensions"]["traceId"] == response.headers["x-trace-id"]
    logged = [record for record in caplog.records if trace_id in record.getMessage()]
    assert any(record.exc_info and SECRET in str(record.exc_info[1]) for record in logged)


async def test_a_fault_in_a_subscription_is_masked(broken: Graph, platform: LocalPlatform):
    url = await platform.serve()
    document = f'subscription {{ streamSession(id: "s1") {{ {EVENTS} }} }}'
    async with websocket(url) as session:
        with pytest.raises(Exception, match="Something went wrong") as raised:
            async for _ in subscribe(session, document):
                pass
    assert SECRET not in str(raised.value) and "INTERNAL" in str(raised.value)
    async with platform.client(accept="text/event-stream") as client:
        response = await client.post("/graphql", json={"query": document})
    assert "INTERNAL" in response.text and SECRET not in response.text


async def test_every_response_names_its_trace(platform: LocalPlatform):
    graph = Graph(platform)
    for body in ({"query": "{ __typename }"}, {"query": "{ nothing }"}, {"query": "{"}, {"query": 5}, []):
        response = await graph.post(body)
        assert response.json()["extensions"]["traceId"] == response.headers["x-trace-id"]


async def test_a_mistake_in_the_query_keeps_its_words(platform: LocalPlatform):
    answer = await Graph(platform).answer("{ nothing }")
    assert answer["errors"][0]["extensions"]["code"] == "MALFORMED_REQUEST"
    assert "Cannot query field 'nothing'" in answer["errors"][0]["message"]
    assert answer["errors"][0]["locations"] == [{"line": 1, "column": 3}]


async def test_a_router_that_does_not_answer_is_an_expected_failure(
    platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
):
    async def silent(*args: Any, **kwargs: Any) -> Any:
        raise ProviderUnavailable("The router is away. Try again.", "rotunda")

    monkeypatch.setattr(platform.router, "view", silent)
    monkeypatch.setattr(platform.router, "command", silent)
    graph = Graph(platform)
    answer = await graph.answer("{ availableModels { count } }")
    assert answer["errors"][0]["extensions"] == {
        "code": "PROVIDER_UNAVAILABLE",
        "message": "The router is away. Try again.",
        "retryable": True,
        "provider": "rotunda",
        "traceId": answer["extensions"]["traceId"],
    }
    loaded = await graph.run('mutation { loadModel(model: "x") { ... on Failure { code retryable } } }')
    assert loaded["loadModel"] == {"code": "PROVIDER_UNAVAILABLE", "retryable": True}


async def test_an_expected_failure_is_not_logged_as_a_fault(platform: LocalPlatform, caplog: pytest.LogCaptureFixture):
    graph = Graph(platform)
    with caplog.at_level(logging.ERROR):
        assert await graph.refused('{ conversation(id: "nobody") { id } }') == "NOT_FOUND"
        sent = await graph.run(SEND, input={"conversationId": "nobody", "message": "Hello"})
    assert sent["sendMessage"]["code"] == "NOT_FOUND"
    assert caplog.records == []
