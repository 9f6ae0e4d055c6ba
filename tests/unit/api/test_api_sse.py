"""The response that streams: it closes what it streams from, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from serve_app.api.sse import PING, EventStream, encode_event

SCOPE: dict[str, Any] = {"type": "http"}


class Wire:
    """The two ends of an ASGI connection."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.broken = False

    @property
    def chunks(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.broken:
            raise OSError("gone")
        self.sent.append(message)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)


class Source:
    """A generator that knows whether it was closed; it stops for ever after ``chunks``, or fails."""

    def __init__(self, *chunks: bytes, then: str = "end") -> None:
        self.chunks = chunks
        self.then = then
        self.closed = False

    async def generate(self) -> AsyncGenerator[bytes, None]:
        try:
            for chunk in self.chunks:
                yield chunk
            if self.then == "wait":
                await asyncio.Event().wait()
            if self.then == "fail":
                raise ValueError("a fault")
        finally:
            self.closed = True


async def run(source: Source, wire: Wire, heartbeat_s: float = 60) -> None:
    await EventStream(source.generate(), heartbeat_s)(SCOPE, wire.receive, wire.send)


async def test_chunks_go_out_one_by_one_and_the_body_ends() -> None:
    source, wire = Source(b"a", b"b"), Wire()
    await run(source, wire)
    assert wire.sent[0]["status"] == 200
    assert wire.chunks == [b"a", b"b", b""]
    assert source.closed


async def test_leaving_closes_the_source() -> None:
    source, wire = Source(b"a", then="wait"), Wire()
    task = asyncio.create_task(run(source, wire))
    await until(lambda: wire.chunks == [b"a"])
    wire.gone.set()
    await task
    assert source.closed
    assert wire.chunks == [b"a"]


async def test_having_left_before_the_first_chunk_closes_the_source_too() -> None:
    source, wire = Source(then="wait"), Wire()
    wire.gone.set()
    await run(source, wire)
    assert source.closed


async def test_a_broken_connection_closes_the_source() -> None:
    source, wire = Source(b"a", b"b", then="wait"), Wire()
    task = asyncio.create_task(run(source, wire, heartbeat_s=0.01))
    await until(lambda: bool(wire.chunks))
    wire.broken = True
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done and source.closed
    assert isinstance(task.exception(), ClientDisconnect | None)


async def test_a_fault_is_not_swallowed() -> None:
    source, wire = Source(b"a", then="fail"), Wire()
    with pytest.raises(ValueError, match="a fault"):
        await run(source, wire)
    assert b"" not in wire.chunks


async def test_cancelling_the_response_closes_the_source() -> None:
    source, wire = Source(b"a", then="wait"), Wire()
    task = asyncio.create_task(run(source, wire))
    await until(lambda: bool(wire.chunks))
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() and source.closed


async def test_silence_is_filled() -> None:
    source, wire = Source(then="wait"), Wire()
    task = asyncio.create_task(run(source, wire, heartbeat_s=0.005))
    await until(lambda: wire.chunks.count(PING) >= 3)
    wire.gone.set()
    await task
    assert set(wire.chunks) == {PING}


def test_an_event_is_ascii_and_keeps_to_its_lines() -> None:
    chunk = encode_event({"token": "é\u2028\n\r\ud800"}, "name", 7)
    assert chunk == b'id: 7\nevent: name\ndata: {"token":"\\u00e9\\u2028\\n\\r\\ud800"}\n\n'
