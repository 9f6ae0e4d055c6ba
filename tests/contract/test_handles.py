"""Which handle a model's calls go over, and that none that is given up lives on: each reports to Serve for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from deployments import lines
from deployments.effects import Effects
from deployments.handles import ModelHandles
from deployments.lines import Lines
from serve_app.domain.catalog import Entry
from serve_app.domain.errors import ProviderUnavailable
from serve_app.domain.generation import Accepted, Delta, Finish, FinishReason, GenerationRequest, Item, Message, Usage
from serve_app.frames import pack
from serve_app.outbox import Outbox

ENTRY = Entry("tiny", "huggingface", "model-tiny", "model")
REQUEST = GenerationRequest("r", "tiny", (Message.of("user", "hi"),))


class Call:
    """A double of Serve's streaming response: what is cancelled raises as Serve's does."""

    def __init__(self, request: GenerationRequest, endless: bool, gone: bool) -> None:
        self._frames = Outbox().carry(request.request_id, self._items(endless))
        self._gone = gone
        self.cancelled = False

    async def _items(self, endless: bool) -> AsyncGenerator[Item, None]:
        yield Accepted(1)
        yield Delta("a", (1,))
        if endless:
            await asyncio.Event().wait()
        yield Finish(FinishReason.STOP, Usage(1, 1))

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        if self._gone:
            raise DeploymentUnavailableError("it")
        try:
            async for frame in self._frames:
                yield pack(frame)
        except asyncio.CancelledError:
            if self.cancelled:
                raise RequestCancelledError("it") from None
            raise


class Handle:
    """A double of Serve's handle."""

    made: list[Handle]
    endless = False

    def __init__(self, deployment: str, application: str) -> None:
        self.shut = self.gone = False
        self.made.append(self)

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, request: GenerationRequest, epoch: int, ingress: str) -> Call:
        assert not self.shut
        return Call(request, self.endless, self.gone)

    async def shutdown_async(self) -> None:
        self.shut = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    monkeypatch.setattr(lines, "DeploymentHandle", Handle)
    monkeypatch.setattr(lines, "LINGER_S", 0.0)
    monkeypatch.setattr(Handle, "made", [], raising=False)
    return Handle.made


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def shut(handle: Handle) -> None:
    async with asyncio.timeout(5):
        while not handle.shut:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def test_a_client_that_leaves_costs_no_handle(made: list[Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handle, "endless", True)
    models = ModelHandles("ingress-1")
    for _ in range(3):
        stream = models.stream(ENTRY, REQUEST, 1)
        assert isinstance(await anext(stream), Accepted)
        await stream.aclose()
        await settled()
    assert [handle.shut for handle in made] == [False]


async def test_a_handle_to_what_has_gone_is_replaced_and_shut_when_its_last_call_has_ended(made: list[Handle]) -> None:
    models = ModelHandles("ingress-1")
    first = models.stream(ENTRY, REQUEST, 1)
    await anext(first)
    made[0].gone = True
    with pytest.raises(ProviderUnavailable):
        await anext(models.stream(ENTRY, REQUEST, 1))
    assert [type(item) async for item in first][-1] is Finish
    await settled()
    assert made[0].shut
    assert [type(item) async for item in models.stream(ENTRY, REQUEST, 1)] == [Accepted, Delta, Finish]
    assert len(made) == 2 and not made[1].shut


async def test_an_idle_handle_is_shut(made: list[Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "IDLE_HANDLE_S", 0.05)
    models = ModelHandles("ingress-1")
    for _ in range(5):
        assert [type(item) async for item in models.stream(ENTRY, REQUEST, 1)][-1] is Finish
        await asyncio.sleep(0.02)
        assert not made[0].shut and len(made) == 1
    await shut(made[0])


async def test_calls_now_and_then_share_a_handle_until_it_is_idle_or_of_no_use(
    made: list[Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "IDLE_HANDLE_S", 0.05)
    kept = Lines()
    with kept.calling(ENTRY) as outer, kept.calling(ENTRY) as inner:
        assert outer is inner and len(made) == 1
        await asyncio.sleep(0.1)
        await settled()
        assert not made[0].shut  # it is in use, however long
    with pytest.raises(DeploymentUnavailableError), kept.calling(ENTRY):
        raise DeploymentUnavailableError("it")
    await settled()
    assert made[0].shut
    with kept.calling(ENTRY) as again:
        assert again is made[1]  # type: ignore[comparison-overlap]
    await shut(made[1])
    with kept.calling(ENTRY) as third:
        assert third is made[2]  # type: ignore[comparison-overlap]


async def test_a_load_over_a_handle_to_what_has_gone_is_made_over_a_new_one(
    made: list[Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waking:
        async def remote(self) -> bool:
            if len(made) == 1:
                raise DeploymentUnavailableError("it")
            return True

    monkeypatch.setattr(Handle, "warm", Waking(), raising=False)
    told: list[Any] = []
    entry = replace(ENTRY, declared=True)
    offer = cast(Any, SimpleNamespace(by_name={entry.full_name: entry}))
    effects = Effects(offer, cast(Any, None), told.append, lambda application: False)
    effects.load(entry.full_name)
    await settled()
    assert not effects.loading and not told  # a failure would have been told
    assert [handle.shut for handle in made] == [True, False]
