"""A request that is sent again with its Idempotency-Key is the same request."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from serve_app.domain.catalog import ModelState
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.sse import events, parse, text_of

STREAM = "/api/stream-message"
KEY = {"Idempotency-Key": "8f14e45fceea167a"}


async def send(api: httpx.AsyncClient, message: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return await api.post(STREAM, json={"message": message, **fields}, headers=headers)


async def test_the_same_request_again_tells_the_same_reply(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    first = await send(api, "hello [[tokens=5]]", KEY)
    again = await send(api, "hello [[tokens=5]]", KEY)
    assert (first.status_code, again.status_code) == (200, 200)
    assert parse(again.text) == parse(first.text)
    assert len(platform.backend.requests) == 1
    store = platform.services.store
    assert await store.count_conversations() == 1
    assert len(await store.list_messages(parse(first.text)[0].data["conversationId"])) == 2


async def test_a_request_that_is_sent_again_joins_the_running_reply(platform: LocalPlatform) -> None:
    body = {"message": "hello [[tokens=60 pace=0.01]]"}
    async with await platform.connect() as client:
        async with client.stream("POST", STREAM, json=body, headers=KEY) as response:
            stream = events(response)
            seen = [await anext(stream) for _ in range(5)]
        # The connection broke; the client's library tries again.
        async with client.stream("POST", STREAM, json=body, headers=KEY) as response:
            again = [event async for event in events(response)]
    assert again[:5] == seen
    assert text_of(again) == " ".join(f"word{n}" for n in range(60))
    assert len(platform.backend.requests) == 1


async def test_many_at_once_are_one(platform: LocalPlatform) -> None:
    async with platform.client() as client:
        answers = await asyncio.gather(*(send(client, "hello [[tokens=20 pace=0.01]]", KEY) for _ in range(8)))
    assert len({answer.text for answer in answers}) == 1
    assert len(platform.backend.requests) == 1
    assert await platform.services.store.count_conversations() == 1


async def test_a_key_is_for_one_message(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    await send(api, "hello", KEY)
    other = await send(api, "something else", KEY)
    error = other.json()["error"]
    assert (other.status_code, error["code"], error["retryable"]) == (422, "INVALID_INPUT", False)
    assert await platform.services.store.count_conversations() == 1
    assert (await send(api, "something else", {"Idempotency-Key": "another"})).status_code == 200


async def test_a_key_of_another_caller_is_another_key(make_platform: MakePlatform) -> None:
    platform = await make_platform(api_keys=("one-key-of-sixteen", "two-key-of-sixteen"))
    async with platform.client() as client:
        for key in ("one-key-of-sixteen", "two-key-of-sixteen"):
            assert (await send(client, "hello", {**KEY, "Authorization": f"Bearer {key}"})).status_code == 200
    assert len(platform.backend.requests) == 2


async def test_a_private_reply_is_joined_with_its_password_only(
    platform: LocalPlatform, api: httpx.AsyncClient
) -> None:
    first = await send(api, "hello", KEY, password="correct horse battery")
    assert first.status_code == 200
    for password, status in ((None, 401), ("wrong", 403), ("correct horse battery", 200)):
        again = await send(api, "hello", KEY, **({"password": password} if password else {}))
        assert again.status_code == status
    assert parse((await send(api, "hello", KEY, password="correct horse battery")).text) == parse(first.text)


async def test_a_key_has_a_length(api: httpx.AsyncClient) -> None:
    assert (await send(api, "hello", {"Idempotency-Key": "k" * 256})).status_code == 422
    assert (await send(api, "hello", {"Idempotency-Key": "k" * 255})).status_code == 200


async def test_a_refused_request_does_not_use_its_key_up(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    platform.router.put("test/chat", ModelState.FAILED)
    assert (await send(api, "hello", KEY)).status_code == 502
    platform.router.put("test/chat", ModelState.READY)
    assert (await send(api, "hello", KEY)).status_code == 200
