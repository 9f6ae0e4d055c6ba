"""Engines over tiny models, made once for all tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.domain.generation import Accepted, Delta, Finish, GenerationRequest, Item, Message, Options
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.transformers import TransformersEngine, create
from tests.engine import tiny_models

MakeEngine = Callable[..., Awaitable[TransformersEngine]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small gain nothing from a second thread, and lose much to it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``chat`` (Llama with a template), ``base`` (without) and ``vision`` (LLaVA)."""
    root = tmp_path_factory.mktemp("store")
    tiny_models.save_causal(root / "chat")
    tiny_models.save_causal(root / "base", template=None)
    tiny_models.save_llava(root / "vision")
    return root


@pytest.fixture
async def make_engine(store: Path) -> AsyncIterator[MakeEngine]:
    made: list[TransformersEngine] = []

    async def make(model: str | Path, **settings: Any) -> TransformersEngine:
        path = store / model
        made.append(await asyncio.to_thread(create, inspect(path, path.name), EngineOptions(**settings)))
        return made[-1]

    yield make
    for engine in made:
        await engine.close()


class Reply:
    """What came of one request."""

    def __init__(self, items: list[Item]) -> None:
        accepted, finish = items[0], items[-1]
        assert isinstance(accepted, Accepted) and isinstance(finish, Finish)
        deltas = [item for item in items if isinstance(item, Delta)]
        self.accepted, self.finish = accepted, finish
        self.text = "".join(delta.text for delta in deltas)
        self.ids = [token for delta in deltas for token in delta.token_ids]


async def ask(engine: TransformersEngine, *messages: Message | str, go_on: bool = False, **options: Any) -> Reply:
    """Greedy and 12 tokens, unless ``options`` say otherwise; a string is a user's message."""
    turns = tuple(Message.of("user", turn) if isinstance(turn, str) else turn for turn in messages)
    settings = {"temperature": 0.0, "max_tokens": 12} | options
    request = GenerationRequest("r", engine.info.id, turns, Options(**settings), continue_final=go_on)
    return Reply([item async for item in engine.generate(request)])


@pytest.fixture(name="ask")
def ask_fixture() -> Callable[..., Awaitable[Reply]]:
    return ask
