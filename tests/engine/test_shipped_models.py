"""The models that come with the product, through the whole engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from serve_app.domain.catalog import Capability
from serve_app.domain.generation import FinishReason, Image, Message
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import discover
from serve_app.engines.transformers import TransformersEngine, create

Ask = Callable[..., Awaitable[Any]]
STORE = Path(__file__).parents[2] / "models" / "huggingface"


def picture() -> Image:
    buffer = io.BytesIO()
    Pillow.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return Image("image/png", buffer.getvalue())


@pytest.fixture(scope="module")
async def chat() -> AsyncIterator[TransformersEngine]:
    infos = {info.id: info for info in discover(STORE)}
    engine = await asyncio.to_thread(create, infos["rotunda/tiny-chat"], EngineOptions())
    yield engine
    await engine.close()


def test_every_shipped_model_is_usable() -> None:
    infos = discover(STORE)
    assert "rotunda/tiny-chat" in {info.id for info in infos}
    assert [info.problem for info in infos] == [None] * len(infos)
    assert all(Capability.CHAT in info.capabilities for info in infos)


async def test_every_shipped_model_answers(ask: Ask) -> None:
    for info in discover(STORE):
        engine = await asyncio.to_thread(create, info, EngineOptions())
        images = (picture(),) if Capability.VISION in info.capabilities else ()
        reply = await ask(engine, Message.of("user", "What do you see?", images), max_tokens=40)
        assert reply.text.strip() and "\ufffd" not in reply.text
        assert "no cache" not in engine.description and "chat template" in engine.description
        await engine.close()


async def test_it_ends_its_replies_by_itself(chat: TransformersEngine, ask: Ask) -> None:
    reply = await ask(chat, "Hello! Who are you?", max_tokens=400)
    assert reply.finish.reason is FinishReason.STOP
    assert reply.text.isprintable() and "<|" not in reply.text


async def test_a_reply_broken_off_anywhere_goes_on_as_it_would_have(chat: TransformersEngine, ask: Ask) -> None:
    whole = await ask(chat, "Hello! Who are you?", max_tokens=60)
    same = 0
    cuts = range(4, len(whole.text) - 4, 5)
    for cut in cuts:
        begun = Message.of("assistant", whole.text[:cut])
        rest = await ask(chat, "Hello! Who are you?", begun, go_on=True, max_tokens=60)
        same += whole.text[:cut] + rest.text == whole.text
    # A text cut within a token is read as other tokens than it was written as, so that a few may differ.
    assert same >= len(cuts) * 0.5


async def test_many_at_once_say_what_one_alone_says(chat: TransformersEngine, ask: Ask) -> None:
    alone = await ask(chat, "Hello!", max_tokens=30)
    together = await asyncio.gather(*(ask(chat, "Hello!", max_tokens=30) for _ in range(8)))
    assert {reply.text for reply in together} == {alone.text}
