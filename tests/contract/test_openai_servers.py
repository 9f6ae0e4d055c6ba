"""Servers that are not ours as upstreams: llama.cpp's and transformers', with a model that we can run ourselves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from serve_app.domain.catalog import Capability
from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import CapabilityMissing, ContextLengthExceeded
from serve_app.domain.generation import Accepted, Delta, Finish, FinishReason, GenerationRequest, Item, Message, Options
from serve_app.providers.openai import OpenAI
from serve_app.providers.wire import Wire
from tests.openai_servers import TINY_CHAT, llama_cpp, transformers_serve

QUESTION, ANSWER = "What is 17 + 25?", "17 + 25 = 42."
GREEDY = Options(temperature=0.0, max_tokens=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with llama_cpp(tmp_path_factory.mktemp("llama"), "tiny") as url:
        yield url


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(tmp_path_factory.mktemp("plain")) as url:
        yield url


@pytest.fixture(params=[("llama", "tiny"), ("plain", str(TINY_CHAT))], ids=["llama.cpp", "transformers serve"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[tuple[OpenAI, str]]:
    """Each server's provider, and what it calls the model."""
    fixture, model = request.param
    made = OpenAI(Wire("lab", request.getfixturevalue(fixture)))
    yield made, model
    await made.close()


def ask(model: str, text: str, options: Options = GREEDY, begun: str = "") -> GenerationRequest:
    continuation = Continuation(begun) if begun else None
    return GenerationRequest("r", model, (Message.of("user", text),), options, continuation=continuation)


async def collect(provider: OpenAI, request: GenerationRequest) -> list[Item]:
    return [item async for item in provider.generate(request)]


def text_of(items: list[Item]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


async def test_a_models_context_is_known_where_the_server_tells_it(llama: str) -> None:
    provider = OpenAI(Wire("lab", llama))
    [info] = await provider.list_models()
    assert (info.id, info.context_length) == ("tiny", 2048)
    assert Capability.CHAT in info.capabilities and Capability.VISION not in info.capabilities
    with pytest.raises(ContextLengthExceeded):
        await collect(provider, ask("tiny", "1 " * 3000))
    await provider.close()


async def test_it_says_what_our_own_engine_says(served: tuple[OpenAI, str]) -> None:
    provider, model = served
    await provider.health()
    assert isinstance(await provider.list_models(), tuple)
    items = await collect(provider, ask(model, QUESTION))
    assert isinstance(items[0], Accepted) and text_of(items) == ANSWER
    finish = items[-1]
    assert isinstance(finish, Finish) and finish.reason is FinishReason.STOP
    assert len([item for item in items if isinstance(item, Delta)]) > 3


async def test_a_limit_of_tokens_is_kept(served: tuple[OpenAI, str]) -> None:
    provider, model = served
    finish = (await collect(provider, ask(model, QUESTION, Options(temperature=0.0, max_tokens=3))))[-1]
    assert isinstance(finish, Finish) and finish.reason is FinishReason.LENGTH


async def test_llama_cpp_is_found_to_go_on_with_a_reply(llama: str) -> None:
    provider = OpenAI(Wire("lab", llama))
    assert text_of(await collect(provider, ask("tiny", QUESTION, begun="17 + 25"))) == " = 42."
    await provider.close()


async def test_transformers_serve_is_found_to_begin_anew(plain: str) -> None:
    provider = OpenAI(Wire("lab", plain))
    with pytest.raises(CapabilityMissing, match="does not go on"):
        await collect(provider, ask(str(TINY_CHAT), QUESTION, begun="17 + 25"))
    await provider.close()
