"""The OpenAI-compatible provider against a server that answers what a test tells it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.domain.catalog import Capability
from serve_app.domain.errors import (
    CapabilityMissing,
    InvalidInput,
    ModelNotFound,
    ProviderError,
    RateLimited,
    RotundaError,
)
from serve_app.domain.generation import (
    Accepted,
    Delta,
    Finish,
    FinishReason,
    GenerationRequest,
    Image,
    Item,
    JsonFormat,
    Message,
    Options,
    Usage,
)
from serve_app.domain.tools import Tool, ToolUse
from serve_app.providers.openai import OpenAI, request_body
from serve_app.providers.wire import Times, Wire
from tests.doubles import serving

KEY = "sk-a-very-secret-key"
TRACE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


def data(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(content: str | None = None, reason: str | None = None, **delta: Any) -> bytes:
    if content is not None:
        delta["content"] = content
    return data({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


USAGE = data({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}})
DONE = b"data: [DONE]\n\n"
WHOLE = (chunk("Hel", role="assistant"), chunk("lo"), chunk(reason="stop"), USAGE, DONE)


@dataclass
class Scripted:
    """Answers each POST with the next of ``answers``: the pieces of a stream, or a response."""

    answers: list[tuple[bytes, ...] | Response] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    models: Any = None
    url: str = ""

    async def post(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        answer = self.answers.pop(0) if self.answers else WHOLE
        if isinstance(answer, Response):
            return answer

        async def pieces() -> AsyncIterator[bytes]:
            for piece in answer:
                yield piece

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def get(self, request: Request) -> Response:
        return JSONResponse(self.models)


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    scripted = Scripted()
    routes = [
        Route("/v1/chat/completions", scripted.post, methods=["POST"]),
        Route("/v1/completions", scripted.post, methods=["POST"]),
        Route("/v1/models", scripted.get),
    ]
    async with serving(Starlette(routes=routes)) as url:  # type: ignore[arg-type]
        scripted.url = f"{url}/v1"
        yield scripted


@pytest.fixture
async def provider(server: Scripted) -> AsyncIterator[OpenAI]:
    made = OpenAI(Wire("lab", server.url, KEY, Times(connect_s=1, first_token_s=2, idle_s=1)))
    yield made
    await made.close()


def ask(text: str = "hi", **more: Any) -> GenerationRequest:
    return GenerationRequest("r", "m", (Message.of("user", text),), trace=TRACE, **more)


async def collect(provider: OpenAI, request: GenerationRequest | None = None) -> list[Item]:
    return [item async for item in provider.generate(request or ask())]


async def test_a_reply_is_accepted_streamed_and_finished_with_its_usage(provider: OpenAI, server: Scripted) -> None:
    items = await collect(provider)
    assert items == [Accepted(0), Delta("Hel"), Delta("lo"), Finish(FinishReason.STOP, Usage(3, 2))]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["traceparent"] == TRACE["traceparent"]
    assert server.bodies[0] == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hi"}],
    }


async def test_the_connection_is_used_again(provider: OpenAI, server: Scripted) -> None:
    for _ in range(3):
        await collect(provider)
    pool = provider._wire._client._transport._pool  # type: ignore[attr-defined]
    assert len(pool.connections) == 1


async def test_crlf_comments_and_events_of_several_lines_are_read(provider: OpenAI, server: Scripted) -> None:
    stream = (
        b": OPENROUTER PROCESSING\r\n\r\n",
        b'data: {"choices": [{"delta":\r\ndata: {"content": "a\xe2\x80\xa8b"}}]}\r\n\r',
        b'\ndata: {"choices": [{"delta": {}, "finish_reason": "length"}]}\r\n\r\n',
    )
    server.answers.append(stream)
    assert await collect(provider) == [Accepted(0), Delta("a\u2028b"), Finish(FinishReason.LENGTH, Usage())]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ((chunk("half"),), "broke off"),
        ((chunk("half"), DONE), "broke off"),
        ((), "broke off"),
        ((chunk("half"), b"data: {not json\n\n"), "cannot be read"),
        ((chunk("half"), data([1])), "no object"),
        ((chunk("half"), data({"error": {"message": "engine died", "code": 500}})), "engine died"),
        ((chunk("half"), data({"error": "engine died"})), "engine died"),
    ],
)
async def test_what_breaks_a_stream_is_an_error_that_may_be_tried_again(
    provider: OpenAI, server: Scripted, stream: tuple[bytes, ...], words: str
) -> None:
    server.answers.append(stream)
    with pytest.raises(ProviderError, match=words) as caught:
        await collect(provider)
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, ProviderError),
        (404, {"error": {"message": "no such model"}}, ModelNotFound),
        (400, {"error": {"message": "messages is wrong"}}, InvalidInput),
        (400, {"error": {"message": f"odd {KEY}"}}, InvalidInput),
        (422, {"detail": [{"loc": ["body", "seed"], "msg": "not an int"}]}, InvalidInput),
        (429, {"error": {"message": "quota"}}, RateLimited),
        (500, "<html>nginx</html>", ProviderError),
        (200, {"error": {"message": "no"}}, ProviderError),
        (200, {"choices": [{"message": {"content": "whole"}}]}, ProviderError),
    ],
)
async def test_refusals_are_typed_and_never_show_the_key(
    provider: OpenAI, server: Scripted, status: int, body: Any, kind: type[RotundaError]
) -> None:
    response = JSONResponse(body, status, {"retry-after": "7"}) if isinstance(body, dict) else Response(body, status)
    server.answers.append(response)
    with pytest.raises(RotundaError) as caught:
        await collect(provider)
    assert type(caught.value) is kind
    assert KEY not in caught.value.message and "<html>" not in caught.value.message
    assert caught.value.retry_after_s == (7 if status == 429 else None)


async def test_a_server_that_does_not_know_stream_options_is_asked_without_from_then_on(
    provider: OpenAI, server: Scripted
) -> None:
    server.answers.append(JSONResponse({"error": {"message": "Unknown parameter: 'stream_options'."}}, 400))
    assert isinstance((await collect(provider))[-1], Finish)
    assert isinstance((await collect(provider))[-1], Finish)
    assert ["stream_options" in body for body in server.bodies] == [True, False, False]


async def test_a_model_that_wants_max_completion_tokens_gets_it(provider: OpenAI, server: Scripted) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    server.answers.append(JSONResponse({"error": {"message": words}}, 400))
    await collect(provider, ask(options=Options(max_tokens=5)))
    assert (server.bodies[0]["max_tokens"], server.bodies[1]["max_completion_tokens"]) == (5, 5)
    assert "max_tokens" not in server.bodies[1]


async def test_tool_calls_reasoning_and_refusals_are_read(provider: OpenAI, server: Scripted) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    server.answers.append(
        (
            chunk(reasoning_content="hm"),
            chunk(tool_calls=[call]),
            chunk(tool_calls=[rest]),
            chunk(refusal="no"),
            chunk(reason="tool_calls"),
        )
    )
    items = await collect(provider)
    deltas = [item for item in items if isinstance(item, Delta)]
    assert deltas[0].reasoning == "hm"
    parts = [part for delta in deltas for part in delta.tool_calls]
    assert (parts[0].id, parts[0].name, "".join(part.arguments for part in parts)) == ("call_1", "f", '{"a": 1}')
    assert deltas[-1].text == "no"
    assert isinstance(items[-1], Finish) and items[-1].reason is FinishReason.TOOL_CALLS


async def test_log_probabilities_are_read(provider: OpenAI, server: Scripted) -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b"}]}]}
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": logprobs, "finish_reason": "stop"}
    server.answers.append((data({"choices": [choice]}),))
    [_, delta, _] = await collect(provider, ask(options=Options(logprobs=1)))
    assert isinstance(delta, Delta)
    assert (delta.logprobs[0].logprob, delta.logprobs[0].data, delta.logprobs[0].top[0].token) == (-0.5, b"a", "b")
    assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 1)


def test_images_options_tools_and_formats_go_in_openais_shape() -> None:
    image = Image("image/png", b"pixels")
    options = Options(temperature=0, max_tokens=9, seed=1, top_k=3, logit_bias={5: -1.0})
    request = GenerationRequest(
        "r",
        "m",
        (Message.of("user", "look", (image,)),),
        options,
        tools=ToolUse((Tool("f"),), name="f", parallel=False),
    )
    body = request_body(request)
    url = f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
    assert body["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "look"},
    ]
    wanted = {"temperature": 0, "max_tokens": 9, "seed": 1, "top_k": 3, "logit_bias": {"5": -1.0}}
    assert {name: body[name] for name in wanted} == wanted
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False
    schema = {"type": "object"}
    formatted = request_body(ask(options=Options(response_format=JsonFormat(schema))))["response_format"]
    assert formatted["json_schema"]["schema"] == schema
    assert request_body(ask(options=Options(stop=("x",))))["stop"] == ["x"]


async def test_an_unfinished_reply_is_not_continued_by_a_server_that_may_start_anew(provider: OpenAI) -> None:
    messages = (Message.of("user", "hi"), Message.of("assistant", "Hel"))
    with pytest.raises(CapabilityMissing):
        await collect(provider, GenerationRequest("r", "m", messages, continue_final=True))


async def test_models_are_listed_with_what_different_servers_tell_of_them(provider: OpenAI, server: Scripted) -> None:
    server.models = {
        "data": [
            {"id": "plain"},
            {"id": "vllm", "max_model_len": 4096},
            {"id": "router", "context_length": 8192, "architecture": {"input_modalities": ["text"]}},
            {"id": "llama.cpp", "meta": {"n_ctx_train": 2048}},
            {"id": 5},
        ]
    }
    found = {info.id: info for info in await provider.list_models()}
    assert {name: info.context_length for name, info in found.items()} == {
        "plain": None,
        "vllm": 4096,
        "router": 8192,
        "llama.cpp": 2048,
    }
    assert Capability.VISION in found["plain"].capabilities
    assert Capability.VISION not in found["router"].capabilities
    assert (await provider.describe("vllm")).context_length == 4096
    with pytest.raises(ModelNotFound):
        await provider.describe("none")
    server.models = [{"id": "bare"}]
    assert [info.id for info in await provider.list_models()] == ["bare"]


async def test_it_has_no_say_in_what_the_server_keeps_in_memory(provider: OpenAI) -> None:
    assert await provider.residency() is None
    for call in (provider.load("m"), provider.unload("m")):
        with pytest.raises(CapabilityMissing):
            await call
