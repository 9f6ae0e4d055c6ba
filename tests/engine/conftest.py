"""Engines over tiny models, made once for all tests of this folder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.domain.generation import Accepted, Delta, Finish, GenerationRequest, Item, Message, Options
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.transformers import TransformersEngine, create
from serve_app.engines.worker import Worker
from tests.engine import tiny_models
from tests.engine.devices import DEVICES, placed

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


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def make_engine(store: Path, device: str) -> AsyncIterator[MakeEngine]:
    made: list[TransformersEngine] = []

    async def make(model: str | Path, **settings: Any) -> TransformersEngine:
        path = store / model
        made.append(
            await asyncio.to_thread(create, inspect(path, path.name), EngineOptions(**placed(device, settings)))
        )
        return made[-1]

    yield make
    for engine in made:
        await engine.close()


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[list[Any]]]:
    """Runs requests that all wait before the first of them is looked at."""
    gate = threading.Event()
    original = Worker._turn

    def turn(self: Worker) -> None:
        gate.wait(30)
        original(self)

    monkeypatch.setattr(Worker, "_turn", turn)

    async def run(engine: TransformersEngine, *asked: Any) -> list[Any]:
        gate.clear()
        tasks = [asyncio.ensure_future(one) for one in asked]
        while len(engine._worker._line) < len(asked):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        gate.set()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    gate.set()
    return run


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
