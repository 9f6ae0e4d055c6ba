"""Server-sent events as a client reads them (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Lines end with CRLF, LF or CR; an empty line ends an event; lines of ``data`` are joined by a line feed; a line that
begins with a colon is a comment. Of an event only its data matter here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_END_OF_LINE = re.compile(rb"\r\n|\n|\r(?!\Z)")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TooLong(ValueError):
    """An event has more bytes than are allowed."""


class SseReader:
    """Turns bytes, however they are cut, into the data of events.

    Args:
        most: bytes of one event.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._first = True

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of each event that is complete now."""
        text = self._rest + chunk
        if self._first and len(text) >= len(BYTE_ORDER_MARK):
            text = text.removeprefix(BYTE_ORDER_MARK)
            self._first = False
        if b"\n" not in chunk and b"\r" not in text[-len(chunk) - 1 :]:
            self._rest = text
            self._check(len(text))
            return
        # A CR at the very end may be the half of a CRLF, so it waits for what follows.
        *lines, self._rest = _END_OF_LINE.split(text)
        for line in lines:
            event = self._line(line)
            if event is not None:
                yield event
        self._check(len(self._rest))

    def _line(self, line: bytes) -> bytes | None:
        if not line:
            data, self._data, self._size = self._data, [], 0
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
            self._check(0)
        return None

    def _check(self, more: int) -> None:
        if self._size + more > self._most:
            raise TooLong
