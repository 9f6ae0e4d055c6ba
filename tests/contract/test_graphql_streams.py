"""Replies that are followed: over WebSockets, server-sent events and multipart; and the fleet's changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import websockets
from gql.transport.exceptions import TransportQueryError

from serve_app.domain.catalog import ModelState
from serve_app.domain.conversation import SessionStatus, StreamSession
from serve_app.domain.errors import ProviderUnavailable
from serve_app.domain.events import Numbered, Terminated, Token
from serve_app.domain.stream_log import Entry, Origin, rows_of
from serve_app.replies import LiveReply
from serve_app.store.records import NewSession
from tests.contract.conftest import MakePlatform
from tests.contract.graphql_client import (
    SEND,
    STREAM_MESSAGE,
    STREAM_SESSION,
    TERMINATE,
    Graph,
    subscribe,
    websocket,
)
from tests.doubles import LocalPlatform

ENDLESS = "Go on [[tokens=5000 pace=0.01]]"


@pytest.fixture
async def graph(platform: LocalPlatform) -> Graph:
    graph = Graph(platform)
    await graph.create()
    return graph


async def send(graph: Graph, message: str, **fields: Any) -> dict[str, Any]:
    sent = await graph.run(SEND, input={"conversationId": "c1", "message": message, **fields})
    answer: dict[str, Any] = sent["sendMessage"]
    return answer


def live(platform: LocalPlatform, session_id: str) -> LiveReply:
    reply = platform.services.sessions.find(session_id)
    assert reply is not None
    return reply


async def ended(platform: LocalPlatform, session_id: str) -> None:
    reply = platform.services.sessions.find(session_id)
    if reply is not None:
        await asyncio.wait_for(reply.done.wait(), 10)


def text_of(events: list[dict[str, Any]]) -> str:
    text = ""
    for event in events:
        if event["__typename"] == "TokenEvent":
            assert event["offset"] == len(text)
            text += event["token"]
    return text


async def test_a_message_streams_over_a_websocket(graph: Graph, platform: LocalPlatform):
    wanted = {"conversationId": "c1", "message": "Say it [[tokens=5]]", "options": {"maxTokens": 3}}
    async with websocket(await platform.serve()) as session:
        seen = [event["streamMessage"] async for event in subscribe(session, STREAM_MESSAGE, input=wanted)]
    opening, *_, end = seen
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
    assert (opening["__typename"], opening["conversationId"], opening["model"]) == ("SessionEvent", "c1", "test/chat")
    assert len(opening["traceId"]) == 32
    assert text_of(seen) == "word0 word1 word2"
    assert (end["__typename"], end["finishReason"], end["usage"]["completionTokens"]) == ("EndEvent", "length", 3)
    saved = await platform.services.store.get_message(end["messageId"])
    assert saved.text == "word0 word1 word2"


async def test_each_operation_on_a_websocket_has_a_trace_of_its_own(graph: Graph, platform: LocalPlatform):
    traces = set()
    async with websocket(await platform.serve()) as session:
        for _ in range(2):
            wanted = {"conversationId": "c1", "message": "Hello [[tokens=1]]"}
            async for event in subscribe(session, STREAM_MESSAGE, input=wanted):
                traces.add(event["streamMessage"].get("traceId"))
    assert len(traces - {None}) == 2


async def test_send_message_returns_the_session_before_the_reply_is_there(graph: Graph, platform: LocalPlatform):
    sent = await send(graph, ENDLESS)
    assert (sent["__typename"], sent["status"], sent["conversationId"]) == ("StreamSession", "ACTIVE", "c1")
    await live(platform, sent["id"]).stream.wait_beyond(3)
    query = "query($id: ID!) { streamSession(id: $id) { status partialResponse tokenCount model error } }"
    found = (await graph.run(query, id=sent["id"]))["streamSession"]
    assert found["status"] == "ACTIVE" and found["partialResponse"].startswith("word0") and found["tokenCount"] > 0
    busy = await send(graph, "Me too")
    assert (busy["__typename"], busy["code"], busy["retryable"]) == ("Failure", "CONVERSATION_BUSY", False)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"message": " "}, "INVALID_INPUT"),
        ({"model": "no/such"}, "MODEL_NOT_FOUND"),
        ({"options": {"temperature": 3}}, "INVALID_INPUT"),
        ({"images": ["bm8gaW1hZ2U="]}, "UNSUPPORTED_MEDIA"),
        ({"conversationId": "nobody"}, "NOT_FOUND"),
    ],
)
async def test_what_cannot_be_sent_is_a_typed_failure(
    graph: Graph, platform: LocalPlatform, fields: dict[str, Any], code: str
):
    sent = await graph.run(SEND, input={"conversationId": "c1", "message": "Hello", **fields})
    assert (sent["sendMessage"]["__typename"], sent["sendMessage"]["code"]) == ("Failure", code)
    assert await platform.services.store.list_messages("c1") == []


async def test_a_message_sent_again_with_its_key_joins_the_reply_it_began(graph: Graph, platform: LocalPlatform):
    message = "Say [[tokens=6 pace=0.02]]"
    sent = [await send(graph, message, idempotencyKey="k1") for _ in range(2)]
    assert sent[0]["id"] == sent[1]["id"]
    await ended(platform, sent[0]["id"])
    assert (await send(graph, message, idempotencyKey="k1"))["id"] == sent[0]["id"]
    assert len(await platform.services.store.list_messages("c1")) == 2
    other = await send(graph, "Something else", idempotencyKey="k1")
    assert (other["__typename"], other["code"]) == ("Failure", "INVALID_INPUT")
    empty = await send(graph, message, idempotencyKey="")
    assert (empty["__typename"], empty["code"]) == ("Failure", "INVALID_INPUT")


async def test_a_running_session_is_followed_from_anywhere(graph: Graph, platform: LocalPlatform):
    session_id = (await send(graph, "Say [[tokens=6 pace=0.02]]"))["id"]
    async with websocket(await platform.serve()) as session:
        whole = [event["streamSession"] async for event in subscribe(session, STREAM_SESSION, id=session_id)]
    assert text_of(whole) == "word0 word1 word2 word3 word4 word5"
    assert whole[-1]["__typename"] == "EndEvent"


async def test_a_follower_goes_on_after_the_last_event_it_saw(graph: Graph, platform: LocalPlatform):
    session_id = (await send(graph, "Say [[tokens=40 pace=0.01]]"))["id"]
    url = await platform.serve()
    first: list[dict[str, Any]] = []
    async with websocket(url) as session:
        async for event in subscribe(session, STREAM_SESSION, id=session_id):
            first.append(event["streamSession"])
            if len(first) == 5:
                break
    async with websocket(url) as session:
        rest = [
            event["streamSession"]
            async for event in subscribe(session, STREAM_SESSION, id=session_id, after=first[-1]["seq"])
        ]
    assert rest[0]["seq"] == first[-1]["seq"] + 1
    assert text_of(first + rest) == " ".join(f"word{number}" for number in range(40))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Say [[tokens=3]]", ["SessionEvent", "TokenEvent", "TokenEvent", "TokenEvent", "EndEvent"]),
        ("Say [[tokens=3 fail_at=2]]", ["SessionEvent", "TokenEvent", "TokenEvent", "ErrorEvent"]),
        ("Say [[error=MEMORY_EXCEEDED]]", ["ErrorEvent"]),
    ],
)
async def test_an_ended_session_is_told_from_its_log(
    graph: Graph, platform: LocalPlatform, message: str, expected: list[str]
):
    session_id = (await send(graph, message))["id"]
    await ended(platform, session_id)
    async with websocket(await platform.serve()) as session:
        seen = [event["streamSession"] async for event in subscribe(session, STREAM_SESSION, id=session_id)]
    assert [event["__typename"] for event in seen] == expected


async def test_a_negative_number_is_no_events(graph: Graph, platform: LocalPlatform):
    session_id = (await send(graph, ENDLESS))["id"]
    async with websocket(await platform.serve()) as session:
        with pytest.raises(TransportQueryError, match="the number of an event"):
            async for _ in subscribe(session, STREAM_SESSION, id=session_id, after=-1):
                pass


async def test_who_saw_more_than_there_is_goes_back(graph: Graph, platform: LocalPlatform):
    session_id = (await send(graph, "Say [[tokens=2]]"))["id"]
    await ended(platform, session_id)
    async with websocket(await platform.serve()) as session:
        seen = [event["streamSession"] async for event in subscribe(session, STREAM_SESSION, id=session_id, after=9)]
    assert [(event["__typename"], event["seq"]) for event in seen] == [("RewindEvent", 4)]


async def test_a_session_that_ends_between_two_looks_is_told_from_its_record(
    graph: Graph, platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
):
    session_id = (await send(graph, "Say [[tokens=2]]"))["id"]
    await ended(platform, session_id)
    whole = await platform.services.store.get_session(session_id)
    stale = [replace(whole, status=SessionStatus.ACTIVE)]

    async def looks(id: str) -> StreamSession:
        return stale.pop() if stale else whole

    monkeypatch.setattr(platform.services.store, "get_session", looks)
    found = await graph.run("query($id: ID!) { streamSession(id: $id) { status } }", id=session_id)
    assert found["streamSession"]["status"] == "COMPLETED"


async def test_terminate_half_way_through_send_message(graph: Graph, platform: LocalPlatform):
    session_id = (await send(graph, ENDLESS))["id"]
    seen: list[dict[str, Any]] = []
    async with websocket(await platform.serve()) as session:
        async for event in subscribe(session, STREAM_SESSION, id=session_id):
            seen.append(event["streamSession"])
            if len(seen) == 4:
                stopped = await graph.run(TERMINATE, input={"sessionId": session_id, "conversationId": "c1"})
    assert stopped["terminateStream"]["success"] is True
    last = seen[-1]
    assert (last["__typename"], last["reason"]) == ("TerminatedEvent", "USER_REQUESTED")
    assert last["partialResponse"] == text_of(seen) == stopped["terminateStream"]["partialResponse"]
    assert (await graph.texts())[1] == ("llm", "terminated", text_of(seen))
    assert platform.engine.counters().running == 0


async def test_a_session_of_another_server_is_read_from_its_log(graph: Graph, platform: LocalPlatform):
    store = platform.services.store
    await store.begin_reply(NewSession("elsewhere", "c1", "test/chat", "huggingface", owner="another"), text="Hello")
    word = Entry(Numbered(1, Token("so far", 0)), Origin("test/chat", "huggingface", 1))
    await store.write_log("another", ["elsewhere"], {"elsewhere": rows_of([word], 0, 1)})
    seen: list[dict[str, Any]] = []
    async with websocket(await platform.serve()) as session:
        async for event in subscribe(session, STREAM_SESSION, id="elsewhere"):
            seen.append(event["streamSession"])
            end = Entry(Numbered(2, Terminated("elsewhere", "so far", 1, "USER_REQUESTED")), Origin())
            if len(seen) == 1:
                rows = rows_of([end], 6, 1)
                await store.finish_session("elsewhere", status=SessionStatus.TERMINATED, text="so far", rows=rows)
    assert [event["__typename"] for event in seen] == ["TokenEvent", "TerminatedEvent"]
    assert (seen[0]["token"], seen[1]["partialResponse"]) == ("so far", "so far")


@pytest.mark.parametrize("way", ["leave", "unsubscribe"])
async def test_a_reader_that_leaves_is_noticed(graph: Graph, platform: LocalPlatform, way: str):
    wanted = {"conversationId": "c1", "message": ENDLESS, "onDisconnect": "CANCEL"}
    async with websocket(await platform.serve()) as session:
        events = subscribe(session, STREAM_MESSAGE, input=wanted)
        opening = (await anext(events))["streamMessage"]
        reply = live(platform, opening["sessionId"])
        if way == "unsubscribe":
            await events.aclose()  # type: ignore[attr-defined]
            await asyncio.wait_for(reply.done.wait(), 5)
    await asyncio.wait_for(reply.done.wait(), 5)
    found = await platform.services.store.get_session(opening["sessionId"])
    assert (found.status, found.termination_reason) == (SessionStatus.TERMINATED, "CLIENT_DISCONNECTED")


@asynccontextmanager
async def sse(url: str, query: str, **variables: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The results of a subscription over graphql-sse, as they arrive."""
    body = {"query": query, "variables": variables}
    async with (
        httpx.AsyncClient(timeout=10) as client,
        client.stream("POST", f"{url}/graphql", json=body, headers={"accept": "text/event-stream"}) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")

        async def results() -> AsyncIterator[dict[str, Any]]:
            name = ""
            async for line in response.aiter_lines():
                field, _, value = line.partition(": ")
                if field == "event":
                    name = value
                elif field == "data" and name == "next":
                    yield json.loads(value)

        yield results()


async def test_a_message_streams_over_server_sent_events(graph: Graph, platform: LocalPlatform):
    wanted = {"conversationId": "c1", "message": "Say [[tokens=4 pace=0.01]]"}
    async with sse(await platform.serve(), STREAM_MESSAGE, input=wanted) as results:
        seen = [result["data"]["streamMessage"] async for result in results]
    assert text_of(seen) == "word0 word1 word2 word3"
    assert seen[-1]["__typename"] == "EndEvent"


async def test_leaving_server_sent_events_is_noticed(graph: Graph, platform: LocalPlatform):
    wanted = {"conversationId": "c1", "message": ENDLESS, "onDisconnect": "CANCEL"}
    async with sse(await platform.serve(), STREAM_MESSAGE, input=wanted) as results:
        opening = (await anext(results))["data"]["streamMessage"]
        reply = live(platform, opening["sessionId"])
    await asyncio.wait_for(reply.done.wait(), 5)
    assert reply.stop_reason == "CLIENT_DISCONNECTED"


async def test_server_sent_events_carry_expected_errors_and_the_trace(graph: Graph, platform: LocalPlatform):
    async with sse(await platform.serve(), STREAM_SESSION, id="nobody") as results:
        (result,) = [result async for result in results]
    assert result["errors"][0]["extensions"]["code"] == "NOT_FOUND"
    assert result["extensions"]["traceId"] == result["errors"][0]["extensions"]["traceId"]


async def test_queries_work_over_server_sent_events(platform: LocalPlatform):
    async with sse(await platform.serve(), "{ __typename }") as results:
        assert [result["data"] async for result in results] == [{"__typename": "Query"}]


async def test_a_message_streams_as_multipart(graph: Graph, platform: LocalPlatform):
    body = {
        "query": STREAM_MESSAGE,
        "variables": {"input": {"conversationId": "c1", "message": "Say [[tokens=2]]"}},
    }
    accept = "multipart/mixed;subscriptionSpec=1.0,application/json"
    async with httpx.AsyncClient(timeout=10) as client:
        response = await client.post(f"{await platform.serve()}/graphql", json=body, headers={"accept": accept})
    assert response.headers["content-type"].startswith("multipart/mixed")
    parts = [
        json.loads(part.partition("\r\n\r\n")[2]) for part in response.text.split("--graphql")[1:-1] if part.strip()
    ]
    seen = [part["payload"]["data"]["streamMessage"] for part in parts if part]
    assert text_of(seen) == "word0 word1"


async def test_queries_and_mutations_work_over_a_websocket(graph: Graph, platform: LocalPlatform):
    async with websocket(await platform.serve()) as session:
        (found,) = [result async for result in subscribe(session, '{ conversation(id: "c1") { id } }')]
    assert found == {"conversation": {"id": "c1"}}


async def test_a_websocket_shows_its_key_when_it_begins(make_platform: MakePlatform):
    platform = await make_platform(api_keys="a-key-of-16-chars")
    url = await platform.serve()
    async with websocket(url, authorization="Bearer a-key-of-16-chars") as session:
        assert [result async for result in subscribe(session, "{ __typename }")] == [{"__typename": "Query"}]
    for payload in ({}, {"authorization": "Bearer wrong"}, {"authorization": 5}):
        async with websockets.connect(
            url.replace("http", "ws") + "/graphql", subprotocols=[websockets.Subprotocol("graphql-transport-ws")]
        ) as raw:
            await raw.send(json.dumps({"type": "connection_init", "payload": payload}))
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await raw.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 4403


@pytest.mark.parametrize(
    "message", ["[]", "5", '"x"', "{", '{"type": "subscribe", "id": "1", "payload": "x"}', "[" * 90_000]
)
async def test_a_websocket_message_of_a_wrong_shape_closes_the_connection(platform: LocalPlatform, message: str):
    async with websockets.connect(
        (await platform.serve()).replace("http", "ws") + "/graphql",
        subprotocols=[websockets.Subprotocol("graphql-transport-ws")],
    ) as raw:
        await raw.send('{"type": "connection_init"}')
        assert json.loads(await raw.recv()) == {"type": "connection_ack"}
        await raw.send(message)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await raw.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 4400


async def test_a_websocket_of_another_site_is_refused(platform: LocalPlatform):
    with pytest.raises(websockets.InvalidStatus):
        await websockets.connect(
            (await platform.serve()).replace("http", "ws") + "/graphql",
            subprotocols=[websockets.Subprotocol("graphql-transport-ws")],
            origin=websockets.Origin("https://evil.example"),
        )


async def test_the_fleets_changes_are_told(platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve_app.api.graphql.subscriptions.FLEET_POLL_S", 0.02)
    view, silent = platform.router.view, False

    async def sometimes() -> Any:
        if silent:
            raise ProviderUnavailable("The router is away.")
        return await view()

    monkeypatch.setattr(platform.router, "view", sometimes)
    query = "subscription { fleetChanged { count items { name state } providers { status } } }"
    async with websocket(await platform.serve()) as session:
        changes = subscribe(session, query)
        first = (await anext(changes))["fleetChanged"]
        assert {item["state"] for item in first["items"]} == {"ready"}
        silent = True
        await asyncio.sleep(0.1)
        platform.router.put("test/chat", ModelState.LOADING)
        silent = False
        second = (await anext(changes))["fleetChanged"]
    assert {item["name"]: item["state"] for item in second["items"]} == {
        "test/chat": "loading",
        "org/name:tag": "ready",
    }
