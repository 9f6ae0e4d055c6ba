"""HTTP/1.1 as a benchmark needs it: each request on a connection of its own, what comes is stamped and kept as it is.

Nothing is decoded while requests run, so that the client takes as little as possible of the processor that it shares
with the server. :func:`body_of` reads afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LAST_CHUNK = b"\r\n0\r\n\r\n"
now = time.perf_counter

Pieces = list[tuple[float, bytes]]


@dataclass(slots=True)
class Exchange:
    """One request and what came back, times by :func:`now`.

    ``error`` says why there is no whole answer: "refused" (no connection), "reset", "closed" (before the end),
    "timeout", "abandoned" (by this side, on purpose).
    """

    sent: float
    pieces: Pieces = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None

    @property
    def status(self) -> int:
        """The HTTP status; 0 when none came."""
        head = self.head
        return int(head[9:12]) if head.startswith(b"HTTP/1.") and head[9:12].isdigit() else 0

    @property
    def head(self) -> bytes:
        whole = b""
        for _, data in self.pieces:
            whole += data
            before, blank, _ = whole.partition(b"\r\n\r\n")
            if blank:
                return before
        return b""

    def header(self, name: str) -> str | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.lower().encode():
                return value.strip().decode("latin-1")
        return None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Target:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// address")
        return cls(parts.hostname, parts.port or 80)


class _Receiver(asyncio.Protocol):
    """Keeps what comes; ``done`` is set at the answer's end, or when the connection is gone."""

    def __init__(self, exchange: Exchange, slow_s: float) -> None:
        self._exchange = exchange
        self._slow_s = slow_s
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._exchange.pieces.append((now(), data))
        if data.endswith(_LAST_CHUNK) or data == _LAST_CHUNK[2:]:
            self._finish()
        elif self._slow_s and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._slow_s, self._resume)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.done.done():
            self._exchange.error = "reset"
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self._exchange.ended = now()
            self.done.set_result(None)


def request_bytes(
    target: Target, path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST"
) -> bytes:
    """A whole request, ready to be written."""
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *(["Content-Type: application/json"] if body else []),
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def exchange(
    target: Target, data: bytes, timeout_s: float = 300.0, leave_after_s: float | None = None, slow_s: float = 0.0
) -> Exchange:
    """Send ``data`` and wait for the whole answer.

    Args:
        leave_after_s: go away after so long, as a person does who closes the page.
        slow_s: pause for so long after each piece that was read: a slow reader.
    """
    result = Exchange(now())
    try:
        transport, receiver = await asyncio.get_running_loop().create_connection(
            lambda: _Receiver(result, slow_s), target.host, target.port
        )
    except OSError:
        result.error, result.ended = "refused", now()
        return result
    transport.write(data)
    limit = timeout_s if leave_after_s is None else leave_after_s
    try:
        await asyncio.wait_for(asyncio.shield(receiver.done), limit)
    except TimeoutError:
        result.error, result.ended = ("timeout" if leave_after_s is None else "abandoned"), now()
        receiver.done.cancel()
    finally:
        transport.abort()
    if result.error is None and not _whole(result):
        result.error = "closed"
    return result


def _whole(result: Exchange) -> bool:
    """Whether the answer came to its own end: a last chunk, or as many bytes as were announced."""
    if result.header("transfer-encoding") == "chunked":
        tail = b"".join(data for _, data in result.pieces[-8:])
        return tail.endswith(_LAST_CHUNK) or tail.endswith(b"\r\n\r\n" + _LAST_CHUNK[2:])
    announced = result.header("content-length")
    if announced is not None:
        return sum(len(data) for _, data in body_of(result)) == int(announced)
    return result.status != 0


def body_of(result: Exchange) -> Iterator[tuple[float, bytes]]:
    """The body's pieces, without head and chunk frames, each with the time at which its last byte came."""
    chunked = result.header("transfer-encoding") == "chunked"
    buffer, begun, left = b"", False, 0
    for at, data in result.pieces:
        buffer += data
        if not begun:
            _, blank, rest = buffer.partition(b"\r\n\r\n")
            if not blank:
                continue
            begun, buffer = True, rest
        if not chunked:
            payload, buffer = buffer, b""
        else:
            payload, buffer, left = _dechunk(buffer, left)
        if payload:
            yield at, payload


def _dechunk(buffer: bytes, left: int) -> tuple[bytes, bytes, int]:
    """What can be read of ``buffer``, what stays, and how many bytes of the present chunk (its CRLF included) lack."""
    out = []
    while buffer:
        if left:
            part, buffer = buffer[:left], buffer[left:]
            out.append(part[: max(left - 2, 0)])
            left -= len(part)
            continue
        line, end, rest = buffer.partition(b"\r\n")
        if not end:
            break
        buffer, left = rest, int(line.split(b";")[0], 16) + 2
    return b"".join(out), buffer, left
