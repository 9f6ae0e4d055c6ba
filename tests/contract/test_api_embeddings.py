"""``/v1/embeddings`` as the official client sees it; the vectors are a double's."""

from __future__ import annotations

import httpx
import openai
import pytest

from serve_app.domain.catalog import Capability, ModelInfo
from tests.contract.conftest import MakePlatform
from tests.doubles import CHAT

EMBEDDING = ModelInfo("test/vectors", "", capabilities=frozenset({Capability.EMBEDDINGS}))
TEXT = ModelInfo("test/chat", "", capabilities=CHAT)


@pytest.fixture
async def client(make_platform: MakePlatform) -> openai.AsyncOpenAI:
    platform = await make_platform(models=(TEXT, EMBEDDING))
    transport = httpx.ASGITransport(platform.app)
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)
    )


async def test_one_text_or_several(client: openai.AsyncOpenAI) -> None:
    one = await client.embeddings.create(model="test/vectors", input="four")
    assert [item.embedding for item in one.data] == [[4.0, 1.0]]
    several = await client.embeddings.create(model="test/vectors", input=["a b", "c"], encoding_format="float")
    assert [(item.index, item.embedding) for item in several.data] == [(0, [3.0, 1.0]), (1, [1.0, 1.0])]
    assert several.usage.prompt_tokens == several.usage.total_tokens == 3


@pytest.mark.parametrize(
    "wrong",
    [{"input": [1, 2]}, {"input": [[1, 2]]}, {"input": "a", "dimensions": 7}, {"input": ["a"] * 2049}],
    ids=["ids", "lists of ids", "dimensions", "too many"],
)
async def test_what_cannot_be_done_is_refused(client: openai.AsyncOpenAI, wrong: dict[str, object]) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        await client.embeddings.create(model="test/vectors", **wrong)  # type: ignore[arg-type]


async def test_a_model_of_text_is_refused_and_the_able_one_is_named(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="test/vectors"):
        await client.embeddings.create(model="test/chat", input="a")
