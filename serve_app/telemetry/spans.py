"""The embedded span store: what ``/traces`` shows when nothing else collects the spans.

Spans of every process travel to the router with its reports and are written there, by one writer, into one SQLite file.
So it works with any number of processes and nodes without a server of its own, and no model replica opens a database.
The router pays a few microseconds per span, at most a dozen spans per reply, and nothing per token.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from opentelemetry.sdk.trace import ReadableSpan

from serve_app.telemetry import semconv

SWEEP_S = 30.0
"""How often old spans are looked for."""


class SpanRow(NamedTuple):
    """One ended span: ids in hex, times in nanoseconds since the epoch, ``kind`` and ``status`` as OTLP numbers them.

    ``root``: whether it is the first of its trace within the platform. ``body``: JSON with attributes, links,
    events, message and resource.
    """

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    start_ns: int
    end_ns: int
    status: int
    root: bool
    body: str


class Kept(Protocol):
    """Where the traces of the whole platform are found; None where they are exported elsewhere."""

    async def traces(self, limit: int, session: str | None) -> list[dict[str, Any]] | None: ...

    async def trace(self, trace_id: str) -> list[SpanRow] | None: ...

    async def figures(self) -> bytes:
        """The figures of the whole platform, as Prometheus reads them."""
        ...


def rows_of(spans: Iterable[ReadableSpan]) -> list[SpanRow]:
    return [_row(span) for span in spans]


def _row(span: ReadableSpan) -> SpanRow:
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    body: dict[str, Any] = {
        "attributes": dict(span.attributes or {}),
        "links": [
            {
                "traceId": f"{link.context.trace_id:032x}",
                "spanId": f"{link.context.span_id:016x}",
                "attributes": dict(link.attributes or {}),
            }
            for link in span.links
        ],
        "events": [
            {"name": event.name, "at": event.timestamp, "attributes": dict(event.attributes or {})}
            for event in span.events
        ],
        "message": span.status.description,
        "resource": {name: span.resource.attributes.get(name) for name in _RESOURCE},
    }
    return SpanRow(
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=f"{parent.span_id:016x}" if parent else "",
        name=span.name,
        kind=span.kind.value + 1,
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        status=span.status.status_code.value,
        root=parent is None or parent.is_remote,
        body=json.dumps(body),
    )


_RESOURCE = (semconv.SERVICE_NAME, semconv.SERVICE_INSTANCE, semconv.HOST_NAME, semconv.ROLE)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spans (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, parent_id TEXT NOT NULL, name TEXT NOT NULL, kind INTEGER NOT NULL,
    start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, status INTEGER NOT NULL, root INTEGER NOT NULL,
    body TEXT NOT NULL, PRIMARY KEY (trace_id, span_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS spans_by_time ON spans (start_ns);
CREATE TABLE IF NOT EXISTS figures (process TEXT PRIMARY KEY, heard REAL NOT NULL, gone INTEGER NOT NULL,
    snapshot BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS roots_by_time ON spans (start_ns) WHERE root;
"""


class SpanStore:
    """Spans of the last days, in an SQLite file; blocks, so call it in a thread. One process writes.

    Args:
        path: the file; its folder is made.
        most_spans: more than that, and the oldest traces go.
        most_age_s: traces that ended so long ago go.
    """

    def __init__(self, path: Path, most_spans: int, most_age_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._most_spans = most_spans
        self._most_age_s = most_age_s
        self._swept = 0.0
        self._connection = sqlite3.connect(path, timeout=5, check_same_thread=False)
        # What a crash of the machine may cost here is not worth a disk flush for every batch.
        self._connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; {_SCHEMA}")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def add(self, rows: Iterable[SpanRow]) -> None:
        """Keep the spans; one that is known already (a report that was sent twice) stays as it is."""
        with self._lock, self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO spans VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
            now = time.monotonic()
            if now - self._swept > SWEEP_S:
                self._swept = now
                self._sweep()

    def _sweep(self) -> None:
        """Delete whole traces, the oldest first, until both bounds hold."""
        oldest = time.time_ns() - int(self._most_age_s * 1e9)
        self._connection.execute(
            "DELETE FROM spans WHERE trace_id IN (SELECT trace_id FROM spans WHERE start_ns < ? "
            "EXCEPT SELECT trace_id FROM spans WHERE end_ns >= ?)",
            (oldest, oldest),
        )
        self._connection.execute(
            "DELETE FROM spans WHERE trace_id IN (SELECT trace_id FROM spans WHERE start_ns <= "
            "(SELECT start_ns FROM spans ORDER BY start_ns DESC LIMIT 1 OFFSET ?))",
            (self._most_spans,),
        )

    def traces(self, limit: int, session: str | None = None) -> list[dict[str, Any]]:
        """The newest traces, by their roots: newest first, as JSON values."""
        where, arguments = "WHERE root", [limit]
        if session is not None:
            where, arguments = "WHERE root AND json_extract(body, ?) = ?", [_SESSION_PATH, session, limit]  # type: ignore[list-item]
        query = (
            f"SELECT r.*, (SELECT count(*) FROM spans s WHERE s.trace_id = r.trace_id) "
            f"FROM (SELECT * FROM spans {where} ORDER BY start_ns DESC LIMIT ?) r"
        )
        with self._lock:
            found = self._connection.execute(query, arguments).fetchall()
        return [_summary(SpanRow(*row[:-1]), row[-1]) for row in found]

    def trace(self, trace_id: str) -> list[SpanRow]:
        """The spans of a trace, in the order in which they began; empty when it is not known."""
        query = "SELECT * FROM spans WHERE trace_id = ? ORDER BY start_ns, end_ns DESC"
        with self._lock:
            found = self._connection.execute(query, (trace_id,)).fetchall()
        return [SpanRow(*row) for row in found]

    def save_figures(self, rows: Iterable[tuple[str, float, bool, bytes]]) -> None:
        """Keep the last figures of every process for the next router (``Totals.to_rows``)."""
        with self._lock, self._connection:
            self._connection.execute("DELETE FROM figures")
            self._connection.executemany("INSERT INTO figures VALUES (?,?,?,?)", rows)

    def figures(self, since: float) -> list[tuple[str, float, bool, bytes]]:
        """What was saved, unless nobody has been heard since then: that was another run of the platform."""
        with self._lock:
            found = self._connection.execute("SELECT * FROM figures").fetchall()
        alive = any(heard >= since for _, heard, _, _ in found)
        return [(process, heard, bool(gone), snapshot) for process, heard, gone, snapshot in found] if alive else []


_SESSION_PATH = f'$.attributes."{semconv.SESSION}"'


def _summary(root: SpanRow, spans: int) -> dict[str, Any]:
    attributes = json.loads(root.body)["attributes"]
    return {
        "traceId": root.trace_id,
        "name": root.name,
        "start": root.start_ns / 1e9,
        "durationMs": round((root.end_ns - root.start_ns) / 1e6, 3),
        "error": attributes.get(semconv.ERROR_TYPE),
        "sessionId": attributes.get(semconv.SESSION),
        "spans": spans,
    }
