"""Server-sent events as a client reads them (WHATWG HTML, section 9.2.6)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Only these end a line; str.splitlines() would also split on U+2028, which a reply may hold.
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """``name`` is empty for unnamed events; ``id`` is the last one that was sent, empty when none was."""

    name: str
    data: str
    id: str


def read_events(chunks: Iterable[bytes]) -> Iterator[ServerEvent]:
    """The events in a body that arrives in any pieces. One that is cut off by its end is left out."""
    name, last_id = "", ""
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield ServerEvent(name, "\n".join(data), last_id)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines, decoded; a final one without an end is dropped. Comments stay: their field name is empty."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        # A carriage return at the end may be the first half of CR LF.
        held = b"\r" if rest.endswith(b"\r") else b""
        *whole, rest = _LINE_END.split(rest[: len(rest) - len(held)])
        rest += held
        for line in whole:
            yield line.decode("utf-8", "replace").removeprefix("\ufeff")
    if rest.endswith(b"\r"):
        yield rest[:-1].decode("utf-8", "replace")
