"""``/v1/completions``, judged by the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.doubles import LocalPlatform

TEXT = "/v1/completions"


@pytest.fixture
async def client(platform: LocalPlatform) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{await platform.serve()}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_a_text_goes_on(platform: LocalPlatform, client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="test/chat", prompt="Once [[tokens=3]]", seed=1, stop="x")
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "word0 word1 word2", "stop", None)
    assert answer.usage is not None and answer.usage.total_tokens == 5
    request = platform.backend.requests[-1]
    assert request.raw and request.messages[0].text == "Once [[tokens=3]]"
    assert (request.options.max_tokens, request.options.stop) == (16, ("x",))


async def test_several_prompts_with_several_choices(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="test/chat", prompt=["a [[tokens=1]]", "b c [[tokens=2]]"], n=2, max_tokens=5
    )
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "word0"), (1, "word0"), (2, "word0 word1"), (3, "word0 word1"),
    ]  # fmt: skip
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_have_their_places(client: AsyncOpenAI, stream: bool) -> None:
    asked: Any = {"model": "test/chat", "prompt": "a [[tokens=3]]", "logprobs": 1}
    if stream:
        chunks = [chunk async for chunk in await client.completions.create(stream=True, **asked)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "word0 word1 word2"
        told: list[Any] = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    else:
        told = [(await client.completions.create(**asked)).choices[0].logprobs]
    assert [token for part in told for token in part.tokens] == ["word0", " word1", " word2"]
    assert [place for part in told for place in part.text_offset] == [0, 5, 11]
    assert [value for part in told for value in part.token_logprobs] == [-0.5] * 3
    assert told[0].top_logprobs[0] == {"alternative 1": -1.0}


async def test_a_stream_ends_with_usage_and_done(api: httpx.AsyncClient) -> None:
    body = {"model": "test/chat", "prompt": "a [[tokens=2]]", "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in (await api.post(TEXT, json=body)).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]" and '"total_tokens":4' in lines[-2]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 33}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [1, 2]}, None),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(api: httpx.AsyncClient, change: dict[str, Any], param: str) -> None:
    response = await api.post(TEXT, json={"model": "test/chat", "prompt": "x", **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, param, "INVALID_INPUT")


async def test_an_unknown_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="nobody/nothing", prompt="x")
