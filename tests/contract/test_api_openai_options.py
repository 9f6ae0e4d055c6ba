"""What can be asked of a chat completion, judged by the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from serve_app.domain.catalog import Capability, ModelInfo
from serve_app.domain.generation import Role
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.transformers import create
from tests.contract.conftest import MakePlatform
from tests.doubles import CHAT as ABLE
from tests.doubles import LocalPlatform
from tests.engine import tiny_models
from tests.sse import parse

CHAT = "/v1/chat/completions"
MODEL = ModelInfo("test/chat", "", capabilities=ABLE | {Capability.TOOLS}, context_length=100_000)
PLAIN = ModelInfo("test/plain", "", capabilities=ABLE, context_length=100_000)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def user(text: str = "hello") -> list[Any]:
    return [{"role": "user", "content": text}]


class Talk:
    """A platform whose model replies with a known text, and the client that speaks to it."""

    def __init__(self, platform: LocalPlatform, client: AsyncOpenAI) -> None:
        self.platform, self.client = platform, client

    def says(self, text: str) -> None:
        from serve_app.engines.scripted import ScriptedEngine

        for info in (MODEL, PLAIN):
            self.platform.backend.engines[info.id] = ScriptedEngine(info, EngineOptions(extra=(("text", text),)))


@pytest.fixture
async def talk(make_platform: MakePlatform) -> AsyncIterator[Talk]:
    platform = await make_platform(models=(MODEL, PLAIN))
    async with AsyncOpenAI(base_url=f"{await platform.serve()}/v1", api_key="unused", max_retries=0) as client:
        yield Talk(platform, client)


@pytest.fixture
async def real(make_platform: MakePlatform, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    """A client of a platform with a real, if tiny and random, model."""
    path = tiny_models.save_causal(tmp_path / "m")
    engine = await asyncio.to_thread(create, inspect(path, "test/chat"), EngineOptions(max_tokens=300))
    platform = await make_platform(models=(ModelInfo("test/chat", "", capabilities=ABLE),))
    platform.backend.engines["test/chat"] = engine  # type: ignore[assignment]
    async with AsyncOpenAI(base_url=f"{await platform.serve()}/v1", api_key="unused", max_retries=0) as client:
        yield client
    await engine.close()


async def test_every_option_reaches_the_model(talk: Talk) -> None:
    await talk.client.chat.completions.create(
        model="test/chat",
        messages=user(),
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        logprobs=True,
        top_logprobs=3,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [9]},
    )
    options = talk.platform.backend.requests[-1].options
    assert (options.presence_penalty, options.frequency_penalty, options.logit_bias) == (0.5, -0.5, {7: -100})
    assert (options.logprobs, options.top_k, options.min_p, options.repetition_penalty) == (3, 5, 0.1, 1.2)
    assert (options.min_tokens, options.stop_token_ids) == (2, (9,))


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_have_openais_shape(talk: Talk, stream: bool) -> None:
    talk.says("Grüße aus Rom")
    asked: Any = {"model": "test/chat", "messages": user(), "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = [chunk async for chunk in await talk.client.chat.completions.create(stream=True, **asked)]
        content = [entry for chunk in chunks if (told := chunk.choices[0].logprobs) for entry in told.content or []]
    else:
        answer = await talk.client.chat.completions.create(**asked)
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
    assert [entry.token for entry in content] == ["Grüße", " aus", " Rom"]
    assert bytes(content[0].bytes or []).decode() == "Grüße" and content[0].logprob == -0.5
    assert [(other.token, other.logprob) for other in content[0].top_logprobs] == [
        ("alternative 1", -1.0),
        ("alternative 2", -2.0),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_have_seeds_of_their_own(talk: Talk, stream: bool) -> None:
    asked: Any = {"model": "test/chat", "messages": user("a [[tokens=3]]"), "n": 3, "seed": 2**63 - 1}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await talk.client.chat.completions.create(**asked)]
        usage = chunks[-1].usage
        texts = {
            index: "".join(chunk.choices[0].delta.content or "" for chunk in chunks
                           if chunk.choices and chunk.choices[0].index == index)
            for index in range(3)
        }  # fmt: skip
        finished = [chunk.choices[0].index for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
        assert sorted(finished) == [0, 1, 2]
    else:
        answer = await talk.client.chat.completions.create(**asked)
        usage, texts = answer.usage, {choice.index: choice.message.content or "" for choice in answer.choices}
    assert texts == dict.fromkeys(range(3), "word0 word1 word2")
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (2, 9)
    requests = talk.platform.backend.requests
    assert {request.options.seed for request in requests} == {2**63 - 1, 0, 1}
    assert len({request.request_id for request in requests}) == 3


async def test_a_choice_that_fails_ends_the_answer_and_the_others(talk: Talk) -> None:
    message = user("[[tokens=9 fail_at=2 error=GENERATION_FAILED]]")
    with pytest.raises(openai.APIStatusError):
        await talk.client.chat.completions.create(model="test/chat", messages=message, n=4)
    stream = await talk.client.chat.completions.create(model="test/chat", messages=message, n=4, stream=True)
    with pytest.raises(openai.APIError, match="The script asked for this failure"):
        async for _ in stream:
            pass
    async with asyncio.timeout(5):
        while talk.platform.engine.counters().running:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


async def test_tool_calls_come_whole_and_streamed(talk: Talk) -> None:
    talk.says(f"Let me look. {CALL}{CALL}")
    asked: Any = {"model": "test/chat", "messages": user(), "tools": [WEATHER]}
    answer = await talk.client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look. ")
    calls = choice.message.tool_calls or []
    assert [(call.type, json.loads(call.function.arguments)) for call in calls if call.type == "function"] == [
        ("function", {"city": "Rome"})
    ] * 2
    async with talk.client.chat.completions.stream(**asked) as stream:
        final = await stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls or []
    assert [call.function.name for call in streamed] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in streamed] == [{"city": "Rome"}] * 2
    assert len({call.id for call in (*calls, *streamed)}) == 4
    assert final.choices[0].finish_reason == "tool_calls"


async def test_a_conversation_with_tools_reaches_the_model(talk: Talk) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: list[Any] = [
        *user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await talk.client.chat.completions.create(
        model="test/chat",
        messages=messages,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
    )
    request = talk.platform.backend.requests[-1]
    assert request.messages[1].tool_calls[0].arguments == '{"city": "Rome"}'
    result = request.messages[2]
    assert (result.role, result.tool_call_id, result.name, result.text) == (Role.TOOL, "call_1", "weather", "sunny")
    assert (request.tools.name, request.tools.parallel) == ("weather", False)


async def test_a_model_that_knows_no_tools_refuses_them(talk: Talk) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="tools") as refused:
        await talk.client.chat.completions.create(model="test/plain", messages=user(), tools=[WEATHER])
    assert refused.value.code == "CAPABILITY_MISSING"
    answer = await talk.client.chat.completions.create(
        model="test/plain", messages=user("a [[tokens=1]]"), tools=[WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.content == "word0"


async def test_reasoning_is_kept_apart(talk: Talk) -> None:
    talk.says("<think> Hm, so. </think> The answer.")
    answer = await talk.client.chat.completions.create(model="test/chat", messages=user())
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, so.", "The answer.")
    stream = await talk.client.chat.completions.create(model="test/chat", messages=user(), stream=True)
    deltas: list[Any] = [chunk.choices[0].delta async for chunk in stream]
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert (reasoning, "".join(delta.content or "" for delta in deltas)) == ("Hm, so.", "The answer.")


class Person(BaseModel):
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=99)
    mood: Literal["good", "bad"]


async def test_the_clients_own_parsing_of_a_form(real: AsyncOpenAI) -> None:
    asked: Any = {"model": "test/chat", "messages": user(), "response_format": Person, "temperature": 1.0, "seed": 5}
    answer = await real.chat.completions.parse(**asked)
    assert isinstance(answer.choices[0].message.parsed, Person)
    async with real.chat.completions.stream(**asked) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


async def test_choices_with_a_real_model(real: AsyncOpenAI) -> None:
    asked: Any = {"model": "test/chat", "messages": user(), "max_completion_tokens": 8, "temperature": 1.5, "seed": 3}
    several = await real.chat.completions.create(n=3, logprobs=True, **asked)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in (await real.chat.completions.create(n=3, **asked)).choices] == texts
    asked["seed"] = 4
    assert (await real.chat.completions.create(**asked)).choices[0].message.content == texts[1]


SCHEMA = {"name": "x", "schema": {"type": "integer", "minimum": 5, "maximum": 3}}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_impossible_schema_is_refused_by_the_model(real: AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="contradicts") as refused:
        await real.chat.completions.create(
            model="test/chat",
            messages=user(),
            response_format={"type": "json_schema", "json_schema": SCHEMA},  # type: ignore[typeddict-item]
            stream=stream,
        )
    assert refused.value.param == "response_format"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"top_p": 0}, "top_p"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(5000)}}, "logit_bias"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": 7}, None),
    ({"stop": [None]}, None),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"max_completion_tokens": 0}, "max_tokens"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "stop": "x"}, "stop"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [*user(), {"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[1].tool_calls"),
]  # type: ignore[list-item]


@pytest.mark.parametrize(("change", "param"), WRONG, ids=[str(change)[:50] for change, _ in WRONG])
async def test_what_is_out_of_range_is_refused_by_name(
    make_platform: MakePlatform, change: dict[str, Any], param: str | None
) -> None:
    platform = await make_platform(models=(MODEL,))
    async with platform.client() as api:
        response = await api.post(CHAT, json={"model": "test/chat", "messages": user(), **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, param, "INVALID_INPUT")
    assert platform.backend.requests == []


async def test_the_bytes_of_a_streamed_call(talk: Talk) -> None:
    talk.says(CALL)
    async with httpx.AsyncClient(base_url=str(talk.client.base_url)) as api:
        body = {"model": "test/chat", "messages": user(), "tools": [WEATHER], "stream": True}
        seen = parse((await api.post("chat/completions", json=body)).text)
    deltas = [event.data["choices"][0]["delta"] for event in seen[:-1]]
    (call,) = deltas[1]["tool_calls"]
    assert {key: call[key] for key in ("index", "type")} == {"index": 0, "type": "function"}
    assert deltas == [{"role": "assistant", "content": ""}, {"tool_calls": [call]}, {}]
    assert seen[-2].data["choices"][0]["finish_reason"] == "tool_calls"
