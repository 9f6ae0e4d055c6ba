"""Ollama's protocol for clients, judged by the official client where it has a say."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import pytest

from serve_app.api.ollama_shape import calls_json
from serve_app.domain.catalog import Capability, ModelInfo, ModelState
from serve_app.domain.generation import Role
from serve_app.domain.tools import ToolCallPart
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.pictures import encoded

HELLO = [{"role": "user", "content": "hello [[tokens=3]]"}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture
async def client(platform: LocalPlatform) -> AsyncIterator[ollama.AsyncClient]:
    made = ollama.AsyncClient(await platform.serve())
    yield made
    await made._client.aclose()


async def test_the_client_gets_a_whole_answer(client: ollama.AsyncClient) -> None:
    answer = await client.chat("test/chat", HELLO)
    assert (answer.message.role, answer.message.content) == ("assistant", "word0 word1 word2")
    assert (answer.model, answer.done, answer.done_reason) == ("test/chat", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (2, 3)
    assert answer.total_duration is not None and answer.total_duration >= (answer.eval_duration or 0) > 0


async def test_the_client_gets_a_streamed_answer(client: ollama.AsyncClient) -> None:
    chunks = [chunk async for chunk in await client.chat("test/chat", HELLO, stream=True)]
    assert "".join(chunk.message.content or "" for chunk in chunks) == "word0 word1 word2"
    assert {chunk.message.role for chunk in chunks} == {"assistant"}
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == 3


async def test_the_lines_of_a_stream(api: httpx.AsyncClient) -> None:
    """As curl sends it: nothing is declared, and a stream is what comes if nothing is said."""
    body = {"model": "test/chat", "messages": [{"role": "user", "content": "say \u2028 é [[echo=true]]"}]}
    response = await api.post("/api/chat", content=json.dumps(body))
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.isascii() and response.text.endswith("\n") and "\n\n" not in response.text
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "say \u2028 é"
    assert all(isinstance(value, int) for name, value in lines[-1].items() if name.endswith(("duration", "count")))


async def test_silence_is_filled_with_empty_pieces(make_platform: MakePlatform) -> None:
    platform = await make_platform(heartbeat_ms=100)
    async with platform.client() as api:
        body = {"model": "test/chat", "messages": [{"role": "user", "content": "wait [[tokens=2 pace=0.4]]"}]}
        lines = [json.loads(line) for line in (await api.post("/api/chat", json=body)).text.splitlines()]
    contents = [line["message"]["content"] for line in lines]
    assert contents.count("") >= 2 and "".join(contents) == "word0 word1"


async def test_a_prompt_is_answered_with_its_system_message(
    platform: LocalPlatform, client: ollama.AsyncClient
) -> None:
    answer = await client.generate("test/chat", "hello [[tokens=2]]", system="Be brief.")
    assert (answer.response, answer.done, answer.eval_count) == ("word0 word1", True, 2)
    request = platform.backend.requests[-1]
    assert [message.role for message in request.messages] == [Role.SYSTEM, Role.USER]
    pieces = [piece async for piece in await client.generate("test/chat", "hi [[tokens=2]]", raw=True, stream=True)]
    assert "".join(piece.response for piece in pieces) == "word0 word1"
    assert platform.backend.requests[-1].raw


async def test_options_formats_and_images_reach_the_model(platform: LocalPlatform, client: ollama.AsyncClient) -> None:
    picture = base64.b64encode(encoded("PNG")).decode()
    options = {"temperature": 0.5, "top_k": 7, "num_predict": 2, "stop": ["x"], "seed": 3, "repeat_penalty": 1.1}
    message = {"role": "user", "content": "look", "images": [picture]}
    await client.chat("test/chat", [message], options={**options, "num_ctx": 4096})
    request = platform.backend.requests[-1]
    assert request.messages[0].images[0].media_type == "image/png" and request.messages[0].text == "look"
    found = request.options
    assert (found.temperature, found.top_k, found.max_tokens, found.stop) == (0.5, 7, 2, ("x",))
    assert (found.seed, found.repetition_penalty) == (3, 1.1)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await client.chat("test/chat", HELLO, format=schema, options={"num_predict": -1})
    form = platform.backend.requests[-1].options.response_format
    assert form is not None and form.schema == schema
    assert platform.backend.requests[-1].options.max_tokens is None
    await client.chat("test/chat", HELLO, format="json")
    assert platform.backend.requests[-1].options.response_format is not None


async def test_tools_are_called_and_their_results_find_their_calls(make_platform: MakePlatform) -> None:
    able = frozenset({Capability.CHAT, Capability.TOOLS})
    platform = await make_platform(models=[ModelInfo("test/tools", "", capabilities=able, context_length=10_000)])
    client = ollama.AsyncClient(await platform.serve())
    question = {"role": "user", "content": f"{CALL} [[echo=true]]"}
    answer = await client.chat("test/tools", [question], tools=[ADD])
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert (call.function.name, dict(call.function.arguments)) == ("add", {"a": 1, "b": 2})
    chunks = [chunk async for chunk in await client.chat("test/tools", [question], tools=[ADD], stream=True)]
    told = [call for chunk in chunks for call in chunk.message.tool_calls or ()]
    assert [dict(call.function.arguments) for call in told] == [{"a": 1, "b": 2}]
    result = {"role": "tool", "tool_name": "add", "content": "3"}
    await client.chat("test/tools", [question, answer.message, result], tools=[ADD])
    *_, asked, answered = platform.backend.requests[-1].messages
    assert answered.tool_call_id == asked.tool_calls[0].id and answered.name == "add"
    with pytest.raises(ollama.ResponseError, match="not called"):
        await client.chat("test/tools", [question, result])
    await client._client.aclose()


async def test_an_empty_prompt_loads_and_keep_alive_of_nought_unloads(
    platform: LocalPlatform, client: ollama.AsyncClient
) -> None:
    platform.router.put("test/chat", ModelState.COLD)
    assert (await client.generate("test/chat")).done_reason == "load"
    assert "test/chat" in {model.model for model in (await client.ps()).models}
    assert (await client.generate("test/chat", keep_alive=0)).done_reason == "unload"
    assert "test/chat" not in {model.model for model in (await client.ps()).models}
    assert (await client.chat("test/chat", [], keep_alive="0s")).done_reason == "unload"


async def test_models_are_listed_shown_and_found_by_clients_that_add_a_tag(client: ollama.AsyncClient) -> None:
    assert {model.model for model in (await client.list()).models} == {"test/chat", "org/name:tag"}
    shown = await client.show("test/chat")
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo is not None and shown.modelinfo["model.context_length"] == 100_000
    assert (await client.chat("test/chat:latest", HELLO)).message.content == "word0 word1 word2"


async def test_the_pool_is_what_pull_and_delete_change(platform: LocalPlatform, client: ollama.AsyncClient) -> None:
    await client.delete("test/chat")
    assert platform.router.removed == {"test/chat"}
    assert [step.status async for step in await client.pull("test/chat", stream=True)][-1] == "success"
    assert platform.router.removed == set()
    with pytest.raises(ollama.ResponseError) as missing:
        await client.pull("nobody/has-this")
    assert missing.value.status_code == 404


async def test_vectors_come_by_the_new_name_and_the_old_one(make_platform: MakePlatform) -> None:
    able = frozenset({Capability.EMBEDDINGS})
    platform = await make_platform(models=[ModelInfo("test/vectors", "", capabilities=able)])
    client = ollama.AsyncClient(await platform.serve())
    several = await client.embed("test/vectors", ["a b", "c"])
    assert [list(vector) for vector in several.embeddings] == [[3.0, 1.0], [1.0, 1.0]]
    assert several.prompt_eval_count == 3
    assert list((await client.embeddings("test/vectors", "four")).embedding) == [4.0, 1.0]
    await client._client.aclose()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat", {"model": "nobody/has-this", "messages": HELLO}, 404, "nobody/has-this"),
        ("chat", {"messages": HELLO}, 422, "model"),
        ("chat", {"model": "test/chat", "messages": HELLO, "options": {"temperature": 9}}, 422, "temperature"),
        ("chat", {"model": "test/chat", "messages": [{"role": "poet", "content": "x"}]}, 422, "role"),
        ("chat", {"model": "test/chat", "messages": [{"role": "user", "content": "x", "images": ["?"]}]}, 422, "image"),
        ("chat", {"model": "test/chat", "messages": HELLO, "format": "xml"}, 422, "format"),
        ("generate", {"model": "test/chat", "prompt": "x", "suffix": "y"}, 422, "suffix"),
        ("generate", {"model": "test/chat", "prompt": "x", "context": [1]}, 422, "context"),
        ("embed", {"model": "test/chat", "input": "x"}, 422, "embeddings"),
        ("show", {"model": "nobody/has-this"}, 404, "nobody/has-this"),
    ],
)
async def test_errors_are_plain_words(
    api: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = await api.post(f"/api/{path}", json=body)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"] and words in response.json()["error"]


async def test_an_error_after_the_first_word_is_a_line(client: ollama.AsyncClient) -> None:
    message = [{"role": "user", "content": "hi [[tokens=9 fail_at=3]]"}]
    said: list[str] = []
    with pytest.raises(ollama.ResponseError, match="script"):
        async for chunk in await client.chat("test/chat", message, stream=True):
            said.append(chunk.message.content or "")
    assert "".join(said).startswith("word0")


async def test_who_leaves_ends_the_generation(platform: LocalPlatform, client: ollama.AsyncClient) -> None:
    message = [{"role": "user", "content": "hi [[tokens=100000 pace=0.005]]"}]
    stream = await client.chat("test/chat", message, stream=True)
    await anext(stream)
    await stream.aclose()
    await client._client.aclose()
    async with asyncio.timeout(10):
        while platform.engine.counters().running:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


def test_a_call_that_broke_off_is_left_out() -> None:
    parts = [ToolCallPart(0, '{"a": ', "1", "add"), ToolCallPart(0, "1}"), ToolCallPart(1, '{"a": ', "2", "add")]
    assert calls_json(parts) == [{"function": {"name": "add", "arguments": {"a": 1}}}]


async def test_the_version_is_told(api: httpx.AsyncClient) -> None:
    assert (await api.get("/api/version")).json()["version"]
    assert (await api.get("/")).text == "Rotunda is running"
