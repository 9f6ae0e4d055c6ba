"""How spans leave a process that exports none itself: with regular reports to the router, which keeps them."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deployments.handles import answering
from deployments.serving import RouterLink
from serve_app.config import Settings
from serve_app.telemetry.spans import SpanRow, SpanStore, rows_of
from serve_app.telemetry.tracing import Tracing, exports_elsewhere

logger = logging.getLogger(__name__)

REPORT_S = 1.0
LAST_REPORT_S = 1.0
"""How long a process that ends waits for the router to take its last report: it may be gone already."""


@dataclass(frozen=True, slots=True)
class TelemetryReport:
    """What a process has recorded since its last report. ``unsent``: spans that are lost if it is killed now."""

    instance: str
    role: str
    spans: tuple[SpanRow, ...] = ()
    unsent: int = 0


class Reporter:
    """Sends the reports of one process.

    Args:
        role: ingress, model or upstream.
        link: to the router.
    """

    def __init__(self, role: str, link: RouterLink) -> None:
        self._role = role
        self._link = link
        self.tracing = Tracing.set_up(role, link.replica_id)
        self._unsent: tuple[SpanRow, ...] = ()

    async def report(self) -> None:
        """Send what there is; what the router does not take is sent again with the next report."""
        outgoing = self.tracing.outgoing
        self._unsent += tuple(rows_of(outgoing.drain()))
        if not self._unsent:
            return
        report = TelemetryReport(self._link.replica_id, self._role, self._unsent, outgoing.unsent)
        if await self._link.tell("telemetry", report):
            self._unsent = self._unsent[len(report.spans) :]

    async def close(self) -> None:
        """Flush: nothing that was recorded is lost when a process ends in order."""
        await self.tracing.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_REPORT_S):
                await self.report()


class Desk:
    """What the router does with the reports: it takes them in, and answers questions about them."""

    _spans: SpanStore | None = None

    def open_desk(self, settings: Settings) -> None:
        """Begin to keep what comes in."""
        if not exports_elsewhere():
            path = settings.rotunda_home / "data" / "traces.db"
            self._spans = SpanStore(path, settings.trace_max_spans, settings.trace_retention_hours * 3600)

    async def telemetry(self, report: TelemetryReport) -> bool:
        """Take the report of a process; True: it need not be sent again."""
        if self._spans is not None and report.spans:
            await asyncio.to_thread(self._spans.add, report.spans)
        return True

    @answering
    async def traces(self, limit: int, session: str | None) -> list[dict[str, Any]] | None:
        """The newest traces; None when they are exported elsewhere."""
        return None if self._spans is None else await asyncio.to_thread(self._spans.traces, limit, session)

    @answering
    async def trace(self, trace_id: str) -> list[SpanRow] | None:
        """The spans of a trace; None when they are exported elsewhere."""
        return None if self._spans is None else await asyncio.to_thread(self._spans.trace, trace_id)
