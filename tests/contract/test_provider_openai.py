"""Our own /v1 as the upstream of another Rotunda: what one side writes, the other reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from serve_app.domain.errors import CapabilityMissing, ModelNotFound, ProviderError, RotundaError
from serve_app.domain.generation import Delta, Finish, FinishReason, GenerationRequest, Image, Item, Message, Options
from serve_app.providers.openai import OpenAI
from serve_app.providers.wire import Wire
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform
from tests.pictures import encoded


@pytest.fixture
async def upstream(make_platform: MakePlatform) -> LocalPlatform:
    return await make_platform()


@pytest.fixture
async def provider(upstream: LocalPlatform) -> AsyncIterator[OpenAI]:
    made = OpenAI(Wire("other", f"{await upstream.serve()}/v1"))
    yield made
    await made.close()


def ask(text: str, model: str = "test/chat", **options: int) -> GenerationRequest:
    return GenerationRequest("r", model, (Message.of("user", text),), Options(**options))


async def collect(provider: OpenAI, request: GenerationRequest) -> list[Item]:
    return [item async for item in provider.generate(request)]


async def test_models_are_listed(provider: OpenAI) -> None:
    assert {info.id for info in await provider.list_models()} == {"test/chat", "org/name:tag"}


async def test_a_reply_comes_through_with_its_usage(provider: OpenAI) -> None:
    items = await collect(provider, ask("hello", max_tokens=5))
    assert len([item for item in items if isinstance(item, Delta)]) >= 1
    finish = items[-1]
    assert isinstance(finish, Finish)
    assert (finish.reason, finish.usage.completion_tokens) == (FinishReason.LENGTH, 5)
    assert finish.usage.prompt_tokens > 0


async def test_an_image_comes_through(provider: OpenAI, upstream: LocalPlatform) -> None:
    message = Message.of("user", "look", (Image("image/png", encoded("PNG")),))
    await collect(provider, GenerationRequest("r", "test/chat", (message,), Options(max_tokens=1)))
    assert upstream.backend.requests[-1].messages[0].images[0].media_type == "image/png"


@pytest.mark.parametrize(("model", "kind"), [("none", ModelNotFound), ("org/name:tag", CapabilityMissing)])
async def test_refusals_keep_their_meaning(provider: OpenAI, model: str, kind: type[RotundaError]) -> None:
    message = Message.of("user", "look", (Image("image/png", encoded("PNG")),))
    with pytest.raises(kind):
        await collect(provider, GenerationRequest("r", model, (message,)))


async def test_a_fault_in_the_middle_is_read_from_the_stream(provider: OpenAI) -> None:
    with pytest.raises(ProviderError) as caught:
        await collect(provider, ask("[[fail_at=3]] hello"))
    assert caught.value.provider == "other"


async def test_leaving_stops_the_generation_over_there(provider: OpenAI, upstream: LocalPlatform) -> None:
    async with aclosing(provider.generate(ask("[[tokens=1000 pace=0.01]] hello"))) as items:
        async for item in items:
            if isinstance(item, Delta):
                break
    async with asyncio.timeout(5):
        while upstream.engine.counters().running:  # noqa: ASYNC110 - another server's state
            await asyncio.sleep(0.01)
    assert upstream.engine.counters().cancelled == 1
