"""The reference clients of both subscription protocols, against the running product."""

from __future__ import annotations

import itertools
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster, wait_until
from tests.conformance import clients
from tests.serve.test_fleet import doors

TRANSPORTS = ("ws", "sse")
EVENTS = """
  __typename seq
  ... on SessionEvent { sessionId }
  ... on TokenEvent { token offset }
  ... on EndEvent { messageId finishReason usage { completionTokens } }
  ... on TerminatedEvent { partialResponse reason }
"""
SEND = f"subscription Send($input: MessageInput!) {{ streamMessage(input: $input) {{ {EVENTS} }} }}"
FOLLOW = f"subscription Follow($id: ID!, $after: Int!) {{ streamSession(id: $id, after: $after) {{ {EVENTS} }} }}"
SESSION = "query Session($id: ID!) { streamSession(id: $id) { status partialResponse messageId terminationReason } }"
CREATE = (
    "mutation Create($input: CreateConversationInput!) { createConversation(input: $input) { conversation { id } } }"
)


class Client:
    """One official client, started anew for each operation."""

    def __init__(self, transport: str, url: str) -> None:
        self.transport = transport
        self.url = url

    def results(self, query: str, take: int | None = None, **variables: Any) -> list[dict[str, Any]]:
        request: dict[str, Any] = {"query": query, "variables": variables}
        if take is not None:
            request["take"] = take
        return clients.run("subscribe.mjs", self.transport, f"{self.url}/graphql", json.dumps(request))

    def data(self, query: str, **variables: Any) -> dict[str, Any]:
        [result] = self.results(query, **variables)
        assert "errors" not in result, result
        return dict(result["data"])

    def events(self, query: str, take: int | None = None, **variables: Any) -> list[dict[str, Any]]:
        found = self.results(query, take, **variables)
        assert all("errors" not in result and "refused" not in result for result in found), found
        return [next(iter(result["data"].values())) for result in found]

    def conversation(self) -> str:
        id = f"conformance-{uuid.uuid4()}"
        made = self.data(CREATE, input={"id": id, "tabName": "Conformance"})
        assert made["createConversation"]["conversation"]["id"] == id
        return id


@pytest.fixture(params=TRANSPORTS)
def client(request: pytest.FixtureRequest, cluster: Cluster) -> Client:
    return Client(request.param, cluster.url)


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["token"] for event in events if event["__typename"] == "TokenEvent")


def session(cluster: Cluster, id: str) -> dict[str, Any]:
    answer = httpx.post(f"{cluster.url}/graphql", json={"query": SESSION, "variables": {"id": id}}, timeout=30)
    return dict(answer.json()["data"]["streamSession"])


def test_a_reply_is_streamed_whole_and_in_order(cluster: Cluster, client: Client):
    message = {"conversationId": client.conversation(), "message": "What is 17 + 25?", "model": "rotunda/tiny-chat"}
    events = client.events(SEND, input=message)
    kinds = [kind for kind, _ in itertools.groupby(event["__typename"] for event in events)]
    assert kinds[0] == "SessionEvent" and kinds[-2:] == ["TokenEvent", "EndEvent"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert "42" in text_of(events) and events[-1]["finishReason"] == "stop"
    stored = session(cluster, events[0]["sessionId"])
    assert stored == {
        "status": "COMPLETED",
        "partialResponse": text_of(events),
        "messageId": events[-1]["messageId"],
        "terminationReason": None,
    }
    told_again = client.events(FOLLOW, id=events[0]["sessionId"], after=0)
    assert text_of(told_again) == text_of(events) and told_again[-1]["__typename"] == "EndEvent"


def test_a_client_that_leaves_ends_a_reply_that_nobody_else_wants(cluster: Cluster, client: Client):
    message = {
        "conversationId": client.conversation(),
        "message": "Count.",
        "model": "test/slow",
        "onDisconnect": "CANCEL",
    }
    events = client.events(SEND, take=5, input=message)
    id = events[0]["sessionId"]
    ended = wait_until(lambda: (found := session(cluster, id))["status"] != "ACTIVE" and found, 10, what="its end")
    assert (ended["status"], ended["terminationReason"]) == ("TERMINATED", "CLIENT_DISCONNECTED")
    assert ended["partialResponse"].startswith(text_of(events)) and text_of(events)


def test_a_reply_is_come_back_to_at_every_ingress(cluster: Cluster, client: Client):
    """Begun at one ingress and left; a viewer who was there and one who was not come to each, while it runs."""
    at = [Client(client.transport, url) for url in doors(cluster)]
    assert len(at) == 2
    message = {"conversationId": client.conversation(), "message": "[[tokens=150]]", "model": "test/slow"}
    begun = at[0].events(SEND, take=20, input=message)
    id = begun[0]["sessionId"]
    with ThreadPoolExecutor() as pool:
        asked = [(one, after) for one in at for after in (0, begun[-1]["seq"])]
        told = list(pool.map(lambda each: each[0].events(FOLLOW, id=id, after=each[1]), asked))
    whole = " ".join(f"word{n}" for n in range(150))
    for (_, after), events in zip(asked, told, strict=True):
        seen = begun + events if after else events
        assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
        assert text_of(seen) == whole
        assert [event["__typename"] for event in seen].count("EndEvent") == 1 and seen[-1]["finishReason"] == "stop"


def test_an_expected_failure_reaches_the_client_as_a_graphql_error(client: Client):
    [result] = client.results(SEND, input={"conversationId": "nobody", "message": "m"})
    [error] = result["errors"]
    assert error["extensions"]["code"] == "NOT_FOUND" and error["extensions"]["traceId"]


def test_an_invalid_document_is_refused(client: Client):
    [result] = client.results("subscription { nothing }")
    errors = result.get("errors") or result["refused"]["errors"]
    assert "nothing" in errors[0]["message"]


def test_the_fleet_is_told_at_once(client: Client):
    [result] = client.results("subscription { fleetChanged { models providers { name status } } }", take=1)
    fleet = result["data"]["fleetChanged"]
    assert "rotunda/tiny-chat" in fleet["models"] and {"name": "huggingface", "status": "ok"} in fleet["providers"]
