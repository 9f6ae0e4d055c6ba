"""Replies as server-sent events: in order, to one end, through partings and stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from serve_app.domain.catalog import ModelState
from serve_app.domain.conversation import MessageStatus, SessionStatus, StreamSession
from serve_app.domain.generation import Role
from serve_app.store.records import NewSession
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.sse import Event, events, parse, text_of

STREAM, TERMINATE = "/api/stream-message", "/api/terminate-stream"
TERMINAL = {"end", "terminated", "error"}
SLOW = "[[tokens=100000 pace=0.005]]"


@asynccontextmanager
async def streaming(
    platform: LocalPlatform, message: str, **fields: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncIterator[Event]]]:
    """A stream over a real connection; leaving the block closes the connection."""
    body = {"message": message, **fields}
    async with await platform.connect() as client, client.stream("POST", STREAM, json=body) as response:
        assert response.status_code == 200, await response.aread()
        yield client, events(response)


async def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for something that another task does."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


async def ended(platform: LocalPlatform, session_id: str) -> StreamSession:
    await until(lambda: platform.services.sessions.find(session_id) is None)
    return await platform.services.store.get_session(session_id)


async def ask(api: httpx.AsyncClient, message: str, **fields: Any) -> list[Event]:
    response = await api.post(STREAM, json={"message": message, **fields})
    assert response.status_code == 200, response.text
    return parse(response.text)


async def test_a_reply_is_session_then_text_then_one_end_each_with_its_number(api: httpx.AsyncClient) -> None:
    seen = await ask(api, "hello [[tokens=5]]")
    assert [event.id for event in seen] == list(range(1, 8))
    assert [event.name for event in seen] == ["session", None, None, None, None, None, "end"]
    assert text_of(seen) == "word0 word1 word2 word3 word4"
    assert set(seen[0].data) == {"sessionId", "conversationId", "model", "provider", "traceId", "contextDropped"}
    assert (seen[0].data["model"], seen[0].data["provider"]) == ("test/chat", "huggingface")
    end = seen[-1].data
    assert end["finishReason"] == "stop"
    assert end["usage"] == {"promptTokens": 2, "completionTokens": 5, "cachedTokens": 0, "totalTokens": 7}
    assert set(end["timing"]) == {"queuedMs", "loadMs", "ttftMs", "decodeMs", "totalMs"}


async def test_headers_keep_proxies_from_holding_events_back(api: httpx.AsyncClient) -> None:
    response = await api.post(STREAM, json={"message": "hello"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-trace-id"] == parse(response.text)[0].data["traceId"]


async def test_the_reply_is_stored_under_the_id_that_end_names(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    seen = await ask(api, "hello [[tokens=2]]")
    stored = await platform.services.store.list_messages(seen[0].data["conversationId"])
    assert [(message.sender, message.text) for message in stored] == [
        ("user", "hello [[tokens=2]]"),
        ("llm", "word0 word1"),
    ]
    assert stored[1].id == seen[-1].data["messageId"]
    assert stored[1].model == "test/chat"


async def test_a_later_message_carries_the_conversation_and_its_system_prompt(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    first = await ask(api, "one [[tokens=1]]", systemPrompt="Be brief.")
    id = first[0].data["conversationId"]
    await ask(api, "two [[tokens=1]]", conversationId=id)
    request = platform.backend.requests[-1]
    assert [message.role for message in request.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER]
    assert [message.text for message in request.messages] == [
        "Be brief.",
        "one [[tokens=1]]",
        "word0",
        "two [[tokens=1]]",
    ]


async def test_all_options_reach_the_model(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    options = {"temperature": 0, "topP": 0.5, "topK": 3, "maxTokens": 2, "stop": ["x"], "seed": 7}
    seen = await ask(api, "hello", options=options, priority="low", contextPolicy="error")
    request = platform.backend.requests[-1]
    assert (request.options.temperature, request.options.top_p, request.options.top_k) == (0, 0.5, 3)
    assert (request.options.max_tokens, request.options.stop, request.options.seed) == (2, ("x",), 7)
    assert (request.priority.name, request.context_policy) == ("LOW", "error")
    assert seen[-1].data["finishReason"] == "length"


async def test_null_means_left_out(api: httpx.AsyncClient) -> None:
    names = ("model", "conversationId", "systemPrompt", "images", "password", "options", "priority", "fallbackModels")
    seen = await ask(api, "hello [[tokens=1]]", **dict.fromkeys(names), onDisconnect=None, contextPolicy=None)
    assert seen[-1].name == "end"


async def test_the_same_fields_work_as_a_form(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    fields = [
        ("message", "hello"),
        ("options", '{"maxTokens": 1, "stop": "x"}'),
        ("fallbackModels", "org/name:tag"),
        ("onDisconnect", "cancel"),
    ]
    response = await api.post(STREAM, files=[(name, (None, value)) for name, value in fields])
    assert parse(response.text)[-1].name == "end"
    assert platform.backend.requests[-1].options.max_tokens == 1
    assert platform.router.asked[-1].fallbacks == ("org/name:tag",)


async def test_the_first_event_comes_while_the_reply_is_still_made(platform: LocalPlatform) -> None:
    async with streaming(platform, f"hello {SLOW}") as (_, stream):
        assert (await anext(stream)).name == "session"
        assert (await anext(stream)).data["token"] == "word0"
        assert platform.engine.counters().running == 1


async def test_a_waiting_request_hears_its_place_then_the_load_then_the_text(platform: LocalPlatform) -> None:
    platform.router.put("test/chat", ModelState.COLD)
    platform.router.hold("test/chat", position=3, reason="memory is full")
    async with streaming(platform, "hello [[tokens=1]]") as (_, stream):
        seen = [await anext(stream), await anext(stream)]
        platform.router.release("test/chat")
        seen += [event async for event in stream]
    assert [event.name for event in seen] == ["session", "queued", "loading", None, "end"]
    assert seen[1].data == {"position": 3, "reason": "memory is full", "etaMs": 1500}
    assert seen[2].data == {"model": "test/chat", "evicting": []}


async def test_silence_is_filled_with_comments_that_have_no_number(make_platform: MakePlatform) -> None:
    platform = await make_platform(heartbeat_ms=100)
    async with streaming(platform, "hello [[tokens=2 ttft=0.35]]") as (_, stream):
        seen = [event async for event in stream]
    names = [event.name for event in seen]
    assert names[0] == "session" and names[-1] == "end"
    assert names.count(":") >= 2
    assert [event.id for event in seen if event.name != ":"] == [1, 2, 3, 4]


async def test_a_fallback_answers_when_the_first_model_fails_before_it_speaks(api: httpx.AsyncClient) -> None:
    seen = await ask(api, "hi [[tokens=1 error=GENERATION_FAILED fail_at=0]]", fallbackModels=["org/name:tag"])
    assert [event.name for event in seen] == ["session", "switched", "error"]
    assert (seen[1].data["from"], seen[1].data["to"]) == ("test/chat", "org/name:tag")


async def test_a_failure_after_the_first_token_ends_the_stream_with_one_error_and_keeps_the_partial(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    seen = await ask(api, "hello [[tokens=9 fail_at=2 error=GENERATION_FAILED]]")
    assert [event.name for event in seen] == ["session", None, None, "error"]
    error = seen[-1].data
    assert (error["code"], error["retryable"]) == ("GENERATION_FAILED", False)
    assert error["provider"] == "huggingface"
    assert error["traceId"] == seen[0].data["traceId"]
    stored = await platform.services.store.list_messages(seen[0].data["conversationId"])
    assert (stored[-1].text, stored[-1].status) == ("word0 word1", MessageStatus.ERROR)


async def test_terminating_half_way_keeps_the_partial_and_stops_the_engine(platform: LocalPlatform) -> None:
    async with streaming(platform, f"hello {SLOW}") as (client, stream):
        seen = [await anext(stream) for _ in range(8)]
        opening = seen[0].data
        body = {"sessionId": opening["sessionId"], "conversationId": opening["conversationId"]}
        response = await client.post(TERMINATE, json=body)
        made = platform.engine.counters().completion_tokens
        seen += [event async for event in stream]
    answer = response.json()
    assert response.status_code == 200 and answer["success"] is True
    assert set(answer) == {
        "success",
        "sessionId",
        "message",
        "partialResponse",
        "tokenCount",
        "usage",
        "providerStopped",
        "finalStatus",
        "terminationReason",
        "savedMessageId",
        "timestamp",
    }
    assert (answer["finalStatus"], answer["terminationReason"]) == ("TERMINATED", "USER_REQUESTED")
    assert [event.name for event in seen if event.name in TERMINAL] == ["terminated"]
    text = text_of(seen)
    assert answer["partialResponse"] == seen[-1].data["partialResponse"] == text
    assert answer["tokenCount"] == answer["usage"]["completionTokens"] == len(text.split())
    assert (answer["usage"]["promptTokens"], answer["providerStopped"]) == (3, True)
    message = await platform.services.store.get_message(answer["savedMessageId"])
    assert (message.text, message.status) == (text, MessageStatus.TERMINATED)
    assert platform.engine.counters().completion_tokens == made
    assert platform.engine.counters().running == 0


async def test_terminating_what_has_ended_says_so(api: httpx.AsyncClient) -> None:
    seen = await ask(api, "hello [[tokens=2]]")
    opening = seen[0].data
    body = {"sessionId": opening["sessionId"], "conversationId": opening["conversationId"]}
    answer = (await api.post(TERMINATE, json=body)).json()
    assert (answer["success"], answer["finalStatus"]) == (False, "COMPLETED")
    assert answer["partialResponse"] == "word0 word1"
    assert answer["savedMessageId"] == seen[-1].data["messageId"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "MALFORMED_REQUEST"),
        ({"sessionId": "s"}, 400, "MALFORMED_REQUEST"),
        ({"sessionId": "s", "conversationId": "SAME", "reason": "because"}, 400, "MALFORMED_REQUEST"),
        ({"sessionId": "s", "conversationId": "nowhere"}, 404, "NOT_FOUND"),
        ({"sessionId": "unknown", "conversationId": "SAME"}, 404, "NOT_FOUND"),
        ({"sessionId": "THEIRS", "conversationId": "SAME"}, 400, "MALFORMED_REQUEST"),
    ],
)
async def test_terminating_something_else_is_refused(
    api: httpx.AsyncClient, body: dict[str, str], status: int, code: str
) -> None:
    ours, theirs = await ask(api, "hello [[tokens=1]]"), await ask(api, "hello [[tokens=1]]")
    known = {"SAME": ours[0].data["conversationId"], "THEIRS": theirs[0].data["sessionId"]}
    response = await api.post(TERMINATE, json={name: known.get(value, value) for name, value in body.items()})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_an_owner_that_does_not_answer_is_a_timeout(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    session = await _elsewhere(platform, ttl_s=60)
    body = {"sessionId": session.id, "conversationId": session.conversation_id}
    response = await api.post(TERMINATE, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["retryable"]) == (504, "TIMEOUT", True)
    pulses = await platform.services.store.write_log("another", [session.id], {})
    assert pulses[session.id].terminate == "USER_REQUESTED"


async def test_leaving_with_cancel_stops_the_engine_and_keeps_the_partial(platform: LocalPlatform) -> None:
    async with streaming(platform, f"hello {SLOW}", onDisconnect="cancel") as (_, stream):
        seen = [await anext(stream) for _ in range(5)]
    session = await ended(platform, seen[0].data["sessionId"])
    assert (session.status, session.termination_reason) == (SessionStatus.TERMINATED, "CLIENT_DISCONNECTED")
    assert session.partial_response.startswith("word0 word1 word2 word3")
    assert platform.engine.counters().running == 0


async def test_leaving_with_detach_lets_the_reply_finish(platform: LocalPlatform) -> None:
    async with streaming(platform, "hello [[tokens=40 pace=0.01]]", onDisconnect="detach") as (_, stream):
        seen = [await anext(stream) for _ in range(3)]
    session = await ended(platform, seen[0].data["sessionId"])
    assert (session.status, session.token_count) == (SessionStatus.COMPLETED, 40)


async def test_nobody_coming_back_ends_a_detached_reply_after_the_grace(make_platform: MakePlatform) -> None:
    platform = await make_platform(detach_grace_ms=100)
    async with streaming(platform, f"hello {SLOW}") as (_, stream):
        seen = [await anext(stream) for _ in range(3)]
    session = await ended(platform, seen[0].data["sessionId"])
    assert (session.status, session.termination_reason) == (SessionStatus.TERMINATED, "CLIENT_DISCONNECTED")


@pytest.mark.parametrize("as_header", [True, False], ids=["Last-Event-ID", "after"])
async def test_coming_back_gives_every_later_event_and_none_twice(platform: LocalPlatform, as_header: bool) -> None:
    async with streaming(platform, "hello [[tokens=60 pace=0.01]]") as (_, stream):
        seen = [await anext(stream) for _ in range(6)]
    last = str(seen[-1].id)
    path = f"{STREAM}/{seen[0].data['sessionId']}"
    headers, params = ({"Last-Event-ID": last}, {}) if as_header else ({}, {"after": last})
    async with await platform.connect() as client, client.stream("GET", path, headers=headers, params=params) as again:
        seen += [event async for event in events(again)]
    assert [event.id for event in seen] == list(range(1, 63))
    assert text_of(seen) == " ".join(f"word{n}" for n in range(60))
    assert [event.name for event in seen if event.name in TERMINAL] == ["end"]


async def test_two_readers_see_the_same_stream(platform: LocalPlatform) -> None:
    async with streaming(platform, "hello [[tokens=30 pace=0.01]]") as (client, stream):
        first = [await anext(stream)]
        async with client.stream("GET", f"{STREAM}/{first[0].data['sessionId']}") as response:
            second = [event async for event in events(response)]
        first += [event async for event in stream]
    assert first == second


@pytest.mark.parametrize(
    ("message", "terminal"),
    [("hello [[tokens=3]]", "end"), ("hello [[tokens=3 fail_at=2 error=GENERATION_FAILED]]", "error")],
)
async def test_a_stream_that_is_over_is_told_from_the_store(
    api: httpx.AsyncClient, message: str, terminal: str
) -> None:
    live = await ask(api, message)
    path = f"{STREAM}/{live[0].data['sessionId']}"
    assert live[-1].name == terminal
    assert parse((await api.get(path)).text) == live
    for last in range(1, len(live)):
        told = parse((await api.get(path, headers={"Last-Event-ID": str(last)})).text)
        assert told == live[last:]


async def test_a_number_that_the_stream_never_had_goes_back_to_its_last(api: httpx.AsyncClient) -> None:
    live = await ask(api, "hello [[tokens=3]]")
    told = parse((await api.get(f"{STREAM}/{live[0].data['sessionId']}?after=99")).text)
    assert [(event.id, event.name) for event in told] == [(5, "rewind")]
    assert told[0].data == {"seq": 5, "offset": len(text_of(live))}


@pytest.mark.parametrize(
    ("message", "terminal"),
    [("hello [[tokens=3]]", "end"), ("hello [[tokens=3 fail_at=2 error=GENERATION_FAILED]]", "error")],
)
async def test_without_its_log_a_stream_is_told_from_its_record(
    platform: LocalPlatform, api: httpx.AsyncClient, message: str, terminal: str
) -> None:
    live = await ask(api, message)
    path = f"{STREAM}/{live[0].data['sessionId']}"
    assert await platform.services.store.prune_log(datetime.now(UTC)) == 1
    told = parse((await api.get(path)).text)
    assert [event.name for event in told] == ["session", None, terminal]
    assert text_of(told) == text_of(live)
    assert told[-1].data == live[-1].data
    # How the text was cut is not known any more: whoever had a part of it is told to drop it first.
    again = parse((await api.get(path, headers={"Last-Event-ID": "3"})).text)
    assert (again[0].name, again[0].data, again[1:]) == ("rewind", {"seq": 0, "offset": 0}, told)


@pytest.mark.parametrize(
    ("path", "status"),
    [(f"{STREAM}/unknown", 404), (f"{STREAM}/KNOWN?after=x", 422), (f"{STREAM}/KNOWN?after=-1", 422)],
)
async def test_following_nonsense_is_refused(api: httpx.AsyncClient, path: str, status: int) -> None:
    known = (await ask(api, "hello [[tokens=1]]"))[0].data["sessionId"]
    assert (await api.get(path.replace("KNOWN", known))).status_code == status


async def test_a_second_request_while_one_runs_is_told_which(platform: LocalPlatform) -> None:
    async with streaming(platform, f"hello {SLOW}") as (client, stream):
        opening = (await anext(stream)).data
        body = {"message": "me too", "conversationId": opening["conversationId"]}
        response = await client.post(STREAM, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["retryable"]) == (409, "CONVERSATION_BUSY", False)
    assert error["details"] == {"sessionId": opening["sessionId"]}


async def test_a_full_server_says_when_to_come_back(make_platform: MakePlatform) -> None:
    platform = await make_platform(max_stream_sessions=1)
    async with streaming(platform, f"hello {SLOW}") as (client, stream):
        await anext(stream)
        response = await client.post(STREAM, json={"message": "me too"})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "QUEUE_FULL")
    assert int(response.headers["retry-after"]) > 0
    assert await platform.services.store.count_conversations() == 1


async def test_a_reply_that_takes_too_long_ends_with_what_there_is(make_platform: MakePlatform) -> None:
    platform = await make_platform(stream_session_timeout_ms=1000)
    async with streaming(platform, f"hello {SLOW}") as (_, stream):
        seen = [event async for event in stream]
    opening, end = seen[0].data, seen[-1]
    assert (end.name, end.data["reason"]) == ("terminated", "TIMEOUT")
    assert end.data["partialResponse"] == text_of(seen) != ""
    session = await ended(platform, opening["sessionId"])
    assert (session.status, session.termination_reason) == (SessionStatus.TERMINATED, "TIMEOUT")
    (message,) = await platform.services.store.last_messages(opening["conversationId"], 1)
    assert (message.text, message.status) == (text_of(seen), MessageStatus.TERMINATED)
    assert platform.engine.counters().running == 0


async def _elsewhere(platform: LocalPlatform, ttl_s: float) -> StreamSession:
    """A running session that another ingress owns."""
    store = platform.services.store
    conversation = await store.create_conversation("c", "A conversation")
    new = NewSession("s", conversation.id, "test/chat", "huggingface", owner="another", ttl_s=ttl_s)
    return (await store.begin_reply(new, text="hello")).session
