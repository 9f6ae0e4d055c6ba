"""The Ollama provider against the stand-in: what it asks, what it reads, and what it makes of every failure."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from serve_app.domain.catalog import Capability
from serve_app.domain.continuation import Continuation
from serve_app.domain.embeddings import EmbeddingRequest
from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidInput,
    MemoryExceeded,
    ModelNotFound,
    ProviderError,
    ProviderUnavailable,
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
)
from serve_app.domain.tools import Tool, ToolCall, ToolUse
from serve_app.providers.ollama import Ollama, request_body
from serve_app.providers.wire import Wire
from tests.ollama_server import Fault, OllamaServer, StandInModel, nothing_listens

TRACE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


def ask(text: str = "one two three", model: str = "llama3:8b", **more: Any) -> GenerationRequest:
    return GenerationRequest("r", model, (Message.of("user", text),), trace=TRACE, **more)


async def collect(provider: Ollama, request: GenerationRequest) -> list[Item]:
    return [item async for item in provider.generate(request)]


def text_of(items: list[Item]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


async def wait_for(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not probe():  # noqa: ASYNC110 - the server runs in another thread
            await asyncio.sleep(0.01)


async def test_a_reply_is_accepted_streamed_and_finished_with_its_counts(ollama: Ollama) -> None:
    items = await collect(ollama, ask())
    assert items[0] == Accepted(0)
    assert text_of(items) == "echo: one two three"
    assert len([item for item in items if isinstance(item, Delta)]) == 4
    finish = items[-1]
    assert isinstance(finish, Finish)
    assert (finish.reason, finish.usage.completion_tokens) == (FinishReason.STOP, 4)
    assert finish.usage.prompt_tokens > 0
    assert finish.timing.decode_s > finish.timing.prefill_s > 0
    assert finish.timing.queue_s > 0


async def test_the_request_carries_the_trace_the_options_and_no_unasked_ones(
    ollama: Ollama, server: OllamaServer
) -> None:
    options = Options(temperature=0.5, top_p=0.9, top_k=5, max_tokens=2, stop=("three",), seed=7, min_p=0.1)
    items = await collect(ollama, ask(options=options))
    assert text_of(items) == "echo: one"
    assert isinstance(items[-1], Finish) and items[-1].reason is FinishReason.LENGTH
    path, body, headers = server.requests[-1]
    assert path == "/api/chat"
    assert headers["traceparent"] == TRACE["traceparent"]
    assert body["options"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "num_predict": 2,
        "seed": 7,
        "min_p": 0.1,
        "stop": ["three"],
    }
    await collect(ollama, ask())
    assert server.bodies()[-1]["options"] == {}


async def test_images_go_as_base64_and_a_system_prompt_as_a_turn(ollama: Ollama, server: OllamaServer) -> None:
    image = Image("image/png", b"\x89PNG pixels")
    messages = (Message.of("system", "be brief"), Message.of("user", "what is this?", (image,)))
    items = await collect(ollama, GenerationRequest("r", "llava:7b", messages))
    assert text_of(items) == "echo: what is this? [1 images]"
    sent = server.bodies()[-1]["messages"]
    assert sent[0] == {"role": "system", "content": "be brief"}
    assert base64.b64decode(sent[1]["images"][0]) == image.data


async def test_a_raw_prompt_is_generated_from_without_a_template(ollama: Ollama, server: OllamaServer) -> None:
    assert text_of(await collect(ollama, ask("<s>raw", raw=True))) == "echo: <s>raw"
    assert server.bodies("/api/generate")[-1]["raw"] is True


def test_tools_calls_and_their_results_go_in_ollamas_shape() -> None:
    tool = Tool("weather", "tells the weather", {"type": "object"})
    call = Message.of("assistant", "")
    call = Message(call.role, (), (ToolCall("call_1", "weather", '{"city": "Oslo"}'),))
    result = Message(Message.of("tool", "rain").role, Message.of("tool", "rain").parts, (), "call_1", "weather")
    request = GenerationRequest("r", "m", (Message.of("user", "?"), call, result), tools=ToolUse((tool,)))
    _, body = request_body(request)
    assert body["tools"][0]["function"]["name"] == "weather"
    assert body["messages"][1]["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    assert body["messages"][2] == {"role": "tool", "content": "rain", "tool_name": "weather"}


def test_a_json_format_and_the_context_policy_reach_the_server() -> None:
    schema = {"type": "object"}
    _, body = request_body(ask(options=Options(response_format=JsonFormat(schema)), context_policy="error"))
    assert (body["format"], body["truncate"]) == (schema, False)
    assert request_body(ask(options=Options(response_format=JsonFormat())))[1]["format"] == "json"


@pytest.mark.parametrize(
    "more",
    [
        {"options": Options(logit_bias={5: 1.0})},
        {"options": Options(stop_token_ids=(1,))},
        {"tools": ToolUse((Tool("f"),), "required")},
    ],
)
async def test_what_ollama_would_silently_ignore_is_refused(ollama: Ollama, more: dict[str, Any]) -> None:
    with pytest.raises(CapabilityMissing):
        await collect(ollama, ask(**more))


async def test_tool_calls_and_thinking_are_read(ollama: Ollama, server: OllamaServer) -> None:
    lines = (
        '{"message":{"role":"assistant","content":"","thinking":"hm"},"done":false}\n'
        '{"message":{"role":"assistant","content":"","tool_calls":[{"function":{"name":"weather",'
        '"arguments":{"city":"Oslo"}}}]},"done":false}\n'
        '{"message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}\n'
    )
    server.faults.append(Fault("raw", after=0, text=lines))
    items = await collect(ollama, ask())
    assert next(item.reasoning for item in items if isinstance(item, Delta)) == "hm"
    [part] = [part for item in items if isinstance(item, Delta) for part in item.tool_calls]
    assert (part.index, part.name, part.arguments) == (0, "weather", '{"city": "Oslo"}')
    assert part.id is not None and part.id.startswith("call_")
    assert isinstance(items[-1], Finish) and items[-1].reason is FinishReason.TOOL_CALLS


async def test_separators_of_lines_inside_a_text_do_not_split_it() -> None:
    text = "a\u2028b\u0085c\u2029d\x1ce"
    with OllamaServer((StandInModel("m:1", reply=text),)) as server:
        provider = Ollama(Wire("lab", server.url))
        assert text_of(await collect(provider, ask(model="m:1"))) == text
        raw = '{"message":{"content":"x\u2028y\u0085z"},"done":true}\n'
        server.faults.append(Fault("raw", after=0, text=raw))
        assert text_of(await collect(provider, ask(model="m:1"))) == "x\u2028y\u0085z"
        await provider.close()


@pytest.mark.parametrize(
    ("fault", "kind", "retryable", "words"),
    [
        (Fault("status", status=503, text="server busy"), ProviderError, True, "server busy"),
        (Fault("status", status=500, text="boom"), ProviderError, True, "boom"),
        (
            Fault("status", status=500, text="model requires more system memory (9 GiB) than is available"),
            MemoryExceeded,
            True,
            "9 GiB",
        ),
        (Fault("status", status=400, text="invalid options"), InvalidInput, False, "invalid options"),
        (
            Fault("status", status=400, text="the input length exceeds the context length"),
            ContextLengthExceeded,
            False,
            "too long",
        ),
        (Fault("status", status=400, text="x does not support images"), CapabilityMissing, False, "images"),
        (Fault("status", status=401, text="bad key sk-123"), ProviderError, False, "refuses our key"),
        (Fault("status", status=429, text="slow down"), RateLimited, True, "slow down"),
        (Fault("status", status=302, text="elsewhere"), ProviderError, False, "address"),
        (Fault("error", text="llama runner process has terminated"), ProviderError, True, "llama runner"),
        (Fault("drop"), ProviderError, True, "broke off"),
        (Fault("end"), ProviderError, True, "broke off"),
        (Fault("garbage"), ProviderError, True, "cannot be read"),
        (Fault("raw", text="[1]\n"), ProviderError, True, "no object"),
        (Fault("slow", seconds=5), DeadlineExceeded, True, "first token"),
        (Fault("hang"), DeadlineExceeded, False, "idle"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else None,
)
async def test_every_fault_is_a_typed_error(
    ollama: Ollama, server: OllamaServer, fault: Fault, kind: type[RotundaError], retryable: bool, words: str
) -> None:
    server.faults.append(fault)
    with pytest.raises(RotundaError) as caught:
        await collect(ollama, ask())
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable
    assert words in caught.value.message
    assert caught.value.provider == "lab"
    assert text_of(await collect(ollama, ask())) == "echo: one two three"


async def test_what_came_before_the_fault_was_delivered(ollama: Ollama, server: OllamaServer) -> None:
    server.faults.append(Fault("error", after=2))
    seen: list[Item] = []
    with pytest.raises(ProviderError):
        async for item in ollama.generate(ask()):
            seen.append(item)
    assert text_of(seen) == "echo: one"


async def test_a_line_without_an_end_is_bounded(
    ollama: Ollama, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.providers.wire.Stream.lines.__defaults__", (1000,))
    server.faults.append(Fault("raw", after=0, text="x" * 5000))
    with pytest.raises(ProviderError, match="more than 1000 bytes"):
        await collect(ollama, ask())


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with nothing_listens() as url:
        provider = Ollama(Wire("lab", url))
        for call in (provider.list_models, provider.health, provider.residency):
            with pytest.raises(ProviderUnavailable) as caught:
                await call()
            assert caught.value.retryable
        with pytest.raises(ProviderUnavailable):
            await collect(provider, ask())
        await provider.close()


async def test_an_unknown_model_is_not_found(ollama: Ollama) -> None:
    for call in (collect(ollama, ask(model="nope")), ollama.describe("nope"), ollama.load("nope")):
        with pytest.raises(ModelNotFound, match="nope"):
            await call


async def test_leaving_closes_the_connection_to_the_server(server: OllamaServer) -> None:
    server.models = (StandInModel("llama3:8b", reply="word " * 500, pace_s=0.02),)
    provider = Ollama(Wire("lab", server.url))
    async with aclosing(provider.generate(ask())) as items:
        async for item in items:
            if isinstance(item, Delta):
                break
        assert server.open == 1
    started = time.monotonic()
    await wait_for(lambda: server.open == 0)
    assert (server.left, time.monotonic() - started < 1) == (1, True)
    await provider.close()


async def test_cancelling_the_reader_closes_the_connection_too(server: OllamaServer) -> None:
    server.faults.append(Fault("hang"))
    provider = Ollama(Wire("lab", server.url))
    task = asyncio.get_running_loop().create_task(collect(provider, ask()))
    await wait_for(lambda: server.open == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_for(lambda: server.open == 0)
    await provider.close()


async def test_models_are_listed_with_what_they_can_do_and_described_once(ollama: Ollama, server: OllamaServer) -> None:
    llama, llava, nomic = await ollama.list_models()
    assert (llama.id, llama.size_bytes, llama.context_length) == ("llama3:8b", 2_000_000_000, 8192)
    assert (llama.quantization, llama.parameters, llama.architecture) == ("Q4_K_M", 8_030_261_248, "llama")
    assert llama.capabilities == {Capability.CHAT, Capability.COMPLETION, Capability.TOOLS}
    assert Capability.VISION in llava.capabilities
    assert nomic.capabilities == {Capability.EMBEDDINGS}
    await ollama.list_models()
    assert len(server.bodies("/api/show")) == 3
    assert (await ollama.describe("llava:7b")).context_length == 4096


async def test_residency_follows_load_use_and_unload(ollama: Ollama) -> None:
    assert await ollama.residency() == {}
    await ollama.load("llama3:8b")
    assert await ollama.residency() == {"llama3:8b": 2_000_000_000}
    await ollama.unload("llama3:8b")
    assert await ollama.residency() == {}
    await collect(ollama, ask())
    assert await ollama.residency() == {"llama3:8b": 2_000_000_000}


async def test_embeddings_come_in_order_and_the_server_is_told_of_the_trace(
    ollama: Ollama, server: OllamaServer
) -> None:
    trace = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    found = await ollama.embed(EmbeddingRequest("r", "nomic:latest", ("a", "abc"), trace=trace))
    assert found.vectors == ((1.0, 1.0), (3.0, 1.0))
    path, _, headers = server.requests[-1]
    assert (path, headers["traceparent"]) == ("/api/embed", trace["traceparent"])


async def test_twenty_replies_at_once_do_not_mix(ollama: Ollama) -> None:
    replies = await asyncio.gather(*(collect(ollama, ask(f"number {number}")) for number in range(20)))
    assert [text_of(items) for items in replies] == [f"echo: number {number}" for number in range(20)]


async def test_a_begun_reply_is_gone_on_with_by_a_last_message_of_the_assistant(
    ollama: Ollama, server: OllamaServer
) -> None:
    begun = Continuation("echo: one ", (1, 2), "another", spent=2)
    items = await collect(ollama, ask(options=Options(max_tokens=3), continuation=begun))
    assert text_of(items) == " two"
    body = server.bodies()[-1]
    assert body["messages"][-1] == {"role": "assistant", "content": "echo: one"}
    assert body["options"] == {"num_predict": 1}


async def test_a_reply_that_has_all_its_tokens_is_over_without_a_call(ollama: Ollama, server: OllamaServer) -> None:
    items = await collect(ollama, ask(options=Options(max_tokens=2), continuation=Continuation("echo: one", spent=2)))
    assert isinstance(items[-1], Finish) and items[-1].reason is FinishReason.LENGTH
    assert not server.bodies()


async def test_what_only_its_own_model_may_go_on_with_is_refused(ollama: Ollama, server: OllamaServer) -> None:
    with pytest.raises(CapabilityMissing):
        await collect(ollama, ask(continuation=Continuation("a", (1,), "another", spent=1, exact=True)))
    deaf = Ollama(Wire("lab", server.url), continues=False)
    with pytest.raises(CapabilityMissing):
        await collect(deaf, ask(continuation=Continuation("a", spent=1)))
    assert not server.bodies()


async def test_a_raw_prompt_is_gone_on_with_behind_its_text(ollama: Ollama, server: OllamaServer) -> None:
    await collect(ollama, ask("Once upon", raw=True, continuation=Continuation(" a time", spent=2)))
    assert server.bodies("/api/generate")[-1]["prompt"] == "Once upon a time"
