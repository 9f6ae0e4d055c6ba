"""What every trace must be, whatever happened in it; and a small language to ask for spans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from serve_app.telemetry.spans import SpanRow

USAGE = "gen_ai.usage.output_tokens"


class Trace:
    """The spans of one trace."""

    def __init__(self, rows: Iterable[SpanRow]) -> None:
        self.rows = sorted(rows, key=lambda row: (row.start_ns, -row.end_ns))
        self._by_id = {row.span_id: row for row in self.rows}

    def __repr__(self) -> str:
        return "\n".join(
            f"{(row.start_ns - self.rows[0].start_ns) / 1e6:9.1f} {(row.end_ns - row.start_ns) / 1e6:9.1f}  {row.name}"
            for row in self.rows
        )

    @property
    def names(self) -> Counter[str]:
        return Counter(row.name for row in self.rows)

    @property
    def root(self) -> SpanRow:
        roots = [row for row in self.rows if row.root]
        assert len(roots) == 1, f"{len(roots)} roots:\n{self}"
        return roots[0]

    def one(self, name: str) -> SpanRow:
        found = [row for row in self.rows if row.name == name]
        assert len(found) == 1, f"{len(found)} spans called {name}:\n{self}"
        return found[0]

    def attributes(self, row: SpanRow) -> dict[str, Any]:
        return dict(json.loads(row.body)["attributes"])

    def links(self, row: SpanRow) -> dict[str, tuple[str, str]]:
        """Trace and span id of each link, by what it is."""
        links = json.loads(row.body)["links"]
        return {link["attributes"]["rotunda.link"]: (link["traceId"], link["spanId"]) for link in links}

    def events(self, row: SpanRow) -> list[dict[str, Any]]:
        """Name, time and attributes of what happened during a span."""
        return list(json.loads(row.body)["events"])

    def parent(self, row: SpanRow) -> SpanRow | None:
        return self._by_id.get(row.parent_id)

    def path(self, name: str) -> list[str]:
        """The names from the root down to the one span with this name."""
        row: SpanRow | None = self.one(name)
        names = []
        while row is not None:
            names.append(row.name)
            row = self.parent(row)
        return names[::-1]

    def unaccounted_ms(self) -> float:
        """How much of the root's time no span without children covers."""
        root = self.root
        parents = {row.parent_id for row in self.rows}
        leaves = sorted((row.start_ns, row.end_ns) for row in self.rows if row.span_id not in parents)
        at, gaps = root.start_ns, 0
        for start, end in leaves:
            gaps += max(0, min(start, root.end_ns) - at)
            at = max(at, end)
        return (gaps + max(0, root.end_ns - at)) / 1e6

    def check(self, phases: Sequence[str] = (), slack_ns: int = 0) -> None:
        """One root, no orphan, children within their parents, all phases there, the time accounted for."""
        self.check_shape(phases, slack_ns)
        root = self.root
        most = max(0.05 * (root.end_ns - root.start_ns) / 1e6, 15.0)
        assert self.unaccounted_ms() <= most, f"{self.unaccounted_ms():.1f} ms of at most {most:.1f} ms:\n{self}"

    def check_shape(self, phases: Sequence[str] = (), slack_ns: int = 0) -> None:
        """:meth:`check` without an account of the time."""
        root = self.root
        assert len({row.trace_id for row in self.rows}) == 1
        for row in self.rows:
            parent = self.parent(row)
            if row is root:
                continue
            assert parent is not None, f"{row.name} is an orphan:\n{self}"
            within = parent.start_ns - slack_ns <= row.start_ns and row.end_ns <= parent.end_ns + slack_ns
            assert within, f"{row.name} reaches out of {parent.name}:\n{self}"
        missing = set(phases) - set(self.names)
        assert not missing, f"{missing} missing in:\n{self}"
