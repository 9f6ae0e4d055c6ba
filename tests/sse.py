"""Server-sent events as tests read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

import httpx


class Event(NamedTuple):
    """One event; ``name`` is None for an unnamed one, and ":" for a comment, whose text is ``data``."""

    id: int | None
    name: str | None
    data: Any


def parse(text: str) -> list[Event]:
    """The events of a whole body, comments included."""
    return [event for block in text.split("\n\n") if block and (event := _event(block.split("\n"))) is not None]


async def events(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a body that is still coming."""
    buffer = b""
    async for chunk in response.aiter_raw():
        buffer += chunk
        *blocks, buffer = buffer.split(b"\n\n")
        for block in blocks:
            event = _event(block.decode().split("\n"))
            if event is not None:
                yield event


def text_of(seen: Iterable[Event]) -> str:
    """The reply that the data events make; each must begin where the one before it ended."""
    text = ""
    for event in seen:
        if event.name is None and isinstance(event.data, dict) and "token" in event.data:
            assert event.data["offset"] == len(text)
            text += event.data["token"]
    return text


def _event(lines: list[str]) -> Event | None:
    if lines[0].startswith(":"):
        return Event(None, ":", lines[0][1:].strip())
    fields = dict(line.split(": ", 1) for line in lines if line)
    if "data" not in fields:
        return None
    data = fields["data"]
    seq = fields.get("id")
    return Event(int(seq) if seq else None, fields.get("event"), data if data == "[DONE]" else json.loads(data))
