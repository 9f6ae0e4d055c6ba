"""Lists of replies: of one conversation, of all public ones, in pages, and never of what is private."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.graphql_client import SEND, Graph
from tests.doubles import LocalPlatform

LIST = """
query Sessions($of: ID, $status: SessionStatus, $password: String, $limit: Int, $after: String) {
  streamSessions(conversationId: $of, status: $status, password: $password, limit: $limit, after: $after) {
    sessions { id conversationId status partialResponse tokenCount model provider startedAt usage { completionTokens } }
    nextCursor
  }
}
"""


@pytest.fixture
async def graph(platform: LocalPlatform) -> Graph:
    graph = Graph(platform)
    await graph.create("open")
    await graph.create("closed", password="hunter22")
    return graph


async def send(graph: Graph, to: str, message: str = "Hello", **fields: Any) -> str:
    """Send a message; returns the id of its session, which has ended unless the message is endless."""
    sent = await graph.run(SEND, input={"conversationId": to, "message": message, **fields})
    id = str(sent["sendMessage"]["id"])
    reply = graph.platform.services.sessions.find(id)
    if reply is not None and "pace" not in message:
        await reply.done.wait()
    return id


async def listed(graph: Graph, **arguments: Any) -> list[str]:
    found = (await graph.run(LIST, **arguments))["streamSessions"]
    return [session["id"] for session in found["sessions"]]


async def test_replies_are_listed_newest_first_by_conversation_and_status(graph: Graph):
    await graph.create("other")
    first, second = await send(graph, "open"), await send(graph, "open")
    elsewhere = await send(graph, "other", "Go on [[tokens=500 pace=0.01]]")
    assert await listed(graph) == [elsewhere, second, first]
    assert await listed(graph, of="open") == [second, first]
    assert await listed(graph, status="ACTIVE") == [elsewhere]
    assert await listed(graph, of="open", status="ACTIVE") == []
    assert await listed(graph, of="open", status="COMPLETED") == [second, first]


async def test_a_running_reply_shows_how_far_it_is(graph: Graph, platform: LocalPlatform):
    id = await send(graph, "open", "Go on [[tokens=500 pace=0.01]]")
    reply = platform.services.sessions.find(id)
    assert reply is not None
    await reply.stream.wait_beyond(4)
    (found,) = (await graph.run(LIST))["streamSessions"]["sessions"]
    assert found["status"] == "ACTIVE" and found["partialResponse"] and found["tokenCount"] >= 3
    assert found["usage"] is None


async def test_replies_in_pages(graph: Graph):
    sent = [await send(graph, "open") for _ in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        found = (await graph.run(LIST, limit=2, after=cursor))["streamSessions"]
        seen += [session["id"] for session in found["sessions"]]
        cursor = found["nextCursor"]
        if cursor is None:
            break
    assert seen == sent[::-1]
    assert await graph.refused(LIST, limit=0) == "INVALID_INPUT"
    assert await graph.refused(LIST, after="?") == "INVALID_INPUT"


async def test_private_replies_are_listed_for_whoever_proves_access_and_nobody_else(graph: Graph):
    public = await send(graph, "open")
    private = await send(graph, "closed", password="hunter22")
    assert await listed(graph) == [public]
    assert await listed(graph, status="COMPLETED") == [public]
    assert await listed(graph, of="closed", password="hunter22") == [private]
    assert await graph.refused(LIST, of="closed") == "UNAUTHENTICATED"
    assert await graph.refused(LIST, of="closed", password="wrong") == "FORBIDDEN"
    assert await graph.refused(LIST, of="nobody") == "NOT_FOUND"
