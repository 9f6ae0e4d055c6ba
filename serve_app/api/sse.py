"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): encoding, and the response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.domain.events import Numbered

PING = b": ping\n\n"
# ASCII: some clients split lines at U+2028 and its like.
encode_json = json.JSONEncoder(separators=(",", ":")).encode


def encode(numbered: Numbered) -> bytes:
    """An event of a stream; its number is the ``id:``."""
    event = numbered.event
    return encode_event(event.payload(), event.name, numbered.seq)


def encode_event(payload: dict[str, Any], name: str | None = None, seq: int | None = None) -> bytes:
    """One event; without a number it is none that a client could come back to."""
    head = "" if seq is None else f"id: {seq}\n"
    if name is not None:
        head += f"event: {name}\n"
    return f"{head}data: {encode_json(payload)}\n\n".encode()


class EventStream(Response):
    """Sends chunks as they come, and something harmless whenever nothing was sent for a while.

    The generator is closed when the stream ends *and* when the client leaves; closing it is how a generation stops.

    Args:
        chunks: encoded events.
        heartbeat_s: seconds of silence before ``ping`` is sent.
        ping: a comment, if not said otherwise.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], heartbeat_s: float, ping: bytes = PING) -> None:
        self.status_code = 200
        self.background = None
        self._chunks = chunks
        self._heartbeat_s = heartbeat_s
        self._ping = ping
        self._sending = asyncio.Lock()
        self._sent_at = 0.0
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            loop = asyncio.get_running_loop()
            self._sent_at = loop.time()
            pump = loop.create_task(self._pump(send))
            beside = (loop.create_task(self._beat(send)), loop.create_task(until_disconnect(receive)))
            try:
                await asyncio.wait((pump, *beside), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (pump, *beside):
                    task.cancel()
                await asyncio.gather(pump, *beside, return_exceptions=True)
            if not pump.cancelled():
                pump.result()

    async def _pump(self, send: Send) -> None:
        async for chunk in self._chunks:
            await self._send(send, chunk)
        async with self._sending:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            silent = loop.time() - self._sent_at
            if silent >= self._heartbeat_s:
                await self._send(send, self._ping)
            else:
                await asyncio.sleep(self._heartbeat_s - silent)

    async def _send(self, send: Send, chunk: bytes) -> None:
        async with self._sending:
            self._sent_at = asyncio.get_running_loop().time()
            try:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except OSError as error:  # how some servers say that the client is gone
                raise ClientDisconnect from error


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has left; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
