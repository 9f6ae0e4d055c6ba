"""OpenAI's protocol, judged by the official client where it has a say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from serve_app.api import choices as surface
from serve_app.domain.catalog import ModelState
from serve_app.domain.generation import Role
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.sse import events, parse

CHAT = "/v1/chat/completions"
SLOW = "[[tokens=100000 pace=0.005]]"


def user(text: Any) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture
async def client(platform: LocalPlatform) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{await platform.serve()}/v1", api_key="unused", max_retries=2) as client:
        yield client


async def until_idle(platform: LocalPlatform) -> None:
    async with asyncio.timeout(10):
        while platform.engine.counters().running:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


async def test_the_client_gets_a_whole_answer(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="test/chat", messages=user("hello [[tokens=3]]"))
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "test/chat", None)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "word0 word1 word2")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 3, 5)


async def test_the_client_gets_a_streamed_answer_with_usage(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="test/chat", messages=user("hello [[tokens=3]]"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "word0 word1 word2"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_bytes_of_a_stream(api: httpx.AsyncClient) -> None:
    body = {"model": "test/chat", "messages": user("hello [[tokens=2]]"), "stream": True}
    response = await api.post(CHAT, json=body)
    seen = parse(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert {(event.id, event.name) for event in seen} == {(None, None)}
    assert seen[-1].data == "[DONE]"
    assert "usage" not in response.text
    deltas = [event.data["choices"][0]["delta"] for event in seen[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "word0"}, {"content": " word1"}, {}]


async def test_the_models_are_listed_and_found(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["org/name:tag", "test/chat"]
    assert {model.owned_by for model in models} == {"huggingface"}
    assert (await client.models.retrieve("org/name:tag")).id == "org/name:tag"


async def test_options_roles_and_images_reach_the_model(platform: LocalPlatform, client: AsyncOpenAI, png: str) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": png, "detail": "low"}}]
    await client.chat.completions.create(
        model="test/chat",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
            {"role": "user", "content": parts},  # type: ignore[typeddict-item]
        ],
        temperature=0.5,
        top_p=0.9,
        stop=["x", "y"],
        seed=3,
        max_tokens=1,
        max_completion_tokens=2,
    )
    request = platform.backend.requests[-1]
    assert [message.role for message in request.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER]
    assert request.messages[3].text == "look" and request.messages[3].images[0].media_type == "image/png"
    assert (request.options.temperature, request.options.top_p, request.options.seed) == (0.5, 0.9, 3)
    assert (request.options.stop, request.options.max_tokens) == (("x", "y"), 2)
    assert request.context_policy == "error"


async def test_what_changes_nothing_is_ignored(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="test/chat",
        messages=user("hello [[tokens=1]]"),
        user="me",
        metadata={"a": "b"},
        store=False,
        n=1,
        logprobs=False,
        logit_bias={},
        tools=[],
        response_format={"type": "text"},
        frequency_penalty=0,
        extra_body={"never_heard_of": True},
    )
    assert answer.choices[0].message.content == "word0"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(api: httpx.AsyncClient, field: str, value: Any) -> None:
    response = await api.post(CHAT, json={"model": "test/chat", "messages": user("x"), field: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (422, field, "invalid_request_error")
    assert field in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "INVALID_INPUT"),
        ({"model": "test/chat"}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": []}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": user("")}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": [{"role": "tool", "content": "x"}]}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": user([{"type": "input_audio"}])}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": user([{"type": "image_url"}])}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": user("x"), "temperature": 3}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": user("x"), "max_tokens": "all"}, 422, "INVALID_INPUT"),
        ({"model": "test/chat", "messages": user("x"), "stream": "yes"}, 422, "INVALID_INPUT"),
        ({"model": "nobody/nothing", "messages": user("x")}, 404, "MODEL_NOT_FOUND"),
        ({"model": "org/name:tag", "messages": user("word " * 100)}, 422, "CONTEXT_LENGTH_EXCEEDED"),
        ({"model": "test/chat", "messages": user("[[error=GENERATION_FAILED]]")}, 502, "GENERATION_FAILED"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_openais_shape_and_are_not_to_be_repeated(
    api: httpx.AsyncClient, body: dict[str, Any], status: int, code: str, stream: bool
) -> None:
    response = await api.post(CHAT, json={"stream": stream, **body})
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "trace_id"}
    assert (response.status_code, error["code"]) == (status, code)
    assert response.headers["x-should-retry"] == "false"
    assert error["trace_id"] == response.headers["x-trace-id"]
    assert "x-trace-id" in response.headers


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "https://example.com/x.png", "file:///etc/passwd"])
async def test_nothing_is_fetched_from_an_address(api: httpx.AsyncClient, url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    response = await api.post(CHAT, json={"model": "test/chat", "messages": user(parts)})
    assert response.status_code == 422
    assert "data URI" in response.json()["error"]["message"]


async def test_an_unknown_path_and_broken_json_have_the_envelope_too(api: httpx.AsyncClient) -> None:
    missing = await api.get("/v1/nowhere")
    assert (missing.status_code, set(missing.json()["error"])) == (
        404,
        {"message", "type", "param", "code", "trace_id"},
    )
    broken = await api.post(CHAT, content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "MALFORMED_REQUEST")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_does_not_repeat_what_cannot_succeed(
    platform: LocalPlatform, client: AsyncOpenAI, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(
            model="test/chat", messages=user("[[error=GENERATION_FAILED]]"), stream=stream
        )
    assert caught.value.status_code == 502
    assert len(platform.backend.requests) == 1


async def test_the_client_repeats_what_may_succeed(platform: LocalPlatform, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="test/chat", messages=user("[[error=QUEUE_FULL]]"))
    requests = {request.request_id for request in platform.backend.requests}
    assert len(requests) == 3


async def test_a_failure_in_the_middle_reaches_the_client_as_an_error(client: AsyncOpenAI) -> None:
    texts: list[str] = []
    stream = await client.chat.completions.create(
        model="test/chat", messages=user("[[tokens=9 fail_at=2 error=GENERATION_FAILED]]"), stream=True
    )
    with pytest.raises(openai.APIError, match="The script asked for this failure"):
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == "word0 word1"


async def test_after_a_failure_in_the_middle_comes_done(api: httpx.AsyncClient) -> None:
    body = {"model": "test/chat", "messages": user("[[tokens=9 fail_at=1 error=MEMORY_EXCEEDED]]"), "stream": True}
    seen = parse((await api.post(CHAT, json=body)).text)
    assert set(seen[-2].data["error"]) == {"message", "type", "param", "code", "trace_id"}
    assert seen[-2].data["error"]["code"] == "MEMORY_EXCEEDED"
    assert seen[-1].data == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_stops_the_engine(platform: LocalPlatform, stream: bool) -> None:
    body = {"model": "test/chat", "messages": user(f"hello {SLOW}"), "stream": stream}
    async with await platform.connect() as api:
        if stream:
            async with api.stream("POST", CHAT, json=body) as response:
                await anext(events(response))
        else:
            request = asyncio.create_task(api.post(CHAT, json=body))
            while not platform.engine.counters().completion_tokens:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)
            request.cancel()
        await until_idle(platform)
    made = platform.engine.counters()
    assert (made.running, made.cancelled) == (0, 1)


async def test_headers_of_a_cold_model_come_before_it_is_loaded(make_platform: MakePlatform) -> None:
    platform = await make_platform(heartbeat_ms=100)
    platform.router.put("test/chat", ModelState.COLD)
    platform.backend.loading["test/chat"] = asyncio.Event()
    body = {"model": "test/chat", "messages": user("hello [[tokens=1]]"), "stream": True}
    async with await platform.connect() as api, api.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        stream = events(response)
        seen = [await anext(stream), await anext(stream)]
        platform.backend.loading["test/chat"].set()
        seen += [event async for event in stream]
    assert [event.name for event in seen].count(":") >= 1
    assert all(event.id is None for event in seen)
    assert [event.data for event in seen if event.name is None][-1] == "[DONE]"


async def test_leaving_while_the_model_loads_gives_the_load_up(platform: LocalPlatform) -> None:
    platform.router.hold("test/chat")
    body = {"model": "test/chat", "messages": user("hello"), "stream": True}
    async with await platform.connect() as api, api.stream("POST", CHAT, json=body) as response:
        await anext(events(response))
    async with asyncio.timeout(5):
        while not platform.router.cancelled:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)
    assert platform.router.cancelled == [platform.router.asked[0].ticket]


async def test_a_resident_model_that_says_nothing_does_not_hold_the_headers_back(
    platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surface, "OPENING_S", 0.05)
    platform.backend.loading["test/chat"] = asyncio.Event()
    body = {"model": "test/chat", "messages": user("hello [[tokens=1]]"), "stream": True}
    async with await platform.connect() as api:
        async with api.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            platform.backend.loading["test/chat"].set()
            assert [event.data async for event in events(response)][-1] == "[DONE]"
        platform.backend.loading["test/chat"].clear()
        async with api.stream("POST", CHAT, json=body) as response:
            await anext(events(response))
    await until_idle(platform)


async def test_nothing_is_stored(platform: LocalPlatform, client: AsyncOpenAI) -> None:
    await client.chat.completions.create(model="test/chat", messages=user("hello [[tokens=1]]"))
    assert await platform.services.store.count_conversations(include_private=True) == 0
    assert await platform.services.store.list_sessions() == []


async def test_with_keys_the_clients_api_key_is_the_one(make_platform: MakePlatform) -> None:
    platform = await make_platform(api_keys="a-key-of-sixteen-characters")
    url = f"{await platform.serve()}/v1"
    async with AsyncOpenAI(base_url=url, api_key="a-key-of-sixteen-characters") as client:
        assert len([model async for model in client.models.list()]) == 2
    async with AsyncOpenAI(base_url=url, api_key="another-key-that-is-wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="test/chat", messages=user("x"))
