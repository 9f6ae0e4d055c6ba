"""The router's side of telemetry: it takes the reports of all processes in, and answers questions about them.

Reports need not be exact in time, so nothing here stands in the way of a request: files are written in a thread.
"""

import asyncio
import logging
import time
from typing import Any

from deployments.handles import answering
from deployments.reporting import ProcessFigures, TelemetryReport
from serve_app.config import Settings
from serve_app.telemetry.exporting import exports_elsewhere
from serve_app.telemetry.metrics import Totals
from serve_app.telemetry.spans import SpanRow, SpanStore
from serve_app.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

SAVE_S = 5.0
"""How often the figures are saved for the next router."""


class Desk:
    """See the module; the router is one."""

    _spans: SpanStore | None = None

    def open_desk(self, settings: Settings) -> None:
        """Begin to keep what comes in, and take over what the router before this one knew."""
        self.tracing = Tracing.off()
        self.tracing.metrics.watch(ProcessFigures("router"))
        self._process = f"router-{time.time_ns()}"
        self._totals = Totals()
        self._unsent: dict[str, int] = {}
        keeps = not exports_elsewhere()
        self._file = SpanStore(
            settings.rotunda_home / "data" / "traces.db",
            settings.trace_max_spans,
            settings.trace_retention_hours * 3600,
        )
        self._spans = self._file if keeps else None
        for process, at, left, figures in self._file.figures(time.time() - self._totals.silence_s * 4):
            self._totals.hear(process, figures, at, left)

    async def telemetry(self, report: TelemetryReport) -> bool:
        """Take the report of a process; True: it need not be sent again."""
        now = time.time()
        self._totals.hear(report.process, report.figures, now, report.leaves)
        self._unsent[report.process] = report.unsent
        if report.leaves:
            self._miss(report.process)
        if self._spans is not None and report.spans:
            await asyncio.to_thread(self._spans.add, report.spans)
        return True

    async def look_at_processes(self) -> None:
        """Miss those who fell silent, and save the figures for the next router."""
        now = time.time()
        for process in [process for process in self._unsent if self._totals.away(process, now)]:
            self._miss(process)
        self._totals.hear(self._process, self.tracing.metrics.snapshot(), now)
        await asyncio.to_thread(self._file.save_figures, self._totals.to_rows())

    def _miss(self, process: str) -> None:
        """A process is gone, and with it the spans that it had not sent."""
        lost = self._unsent.pop(process, 0)
        if lost:
            logger.warning("%d spans were lost with %s", lost, process)
            self.tracing.metrics.spans_lost(lost, "killed")

    @answering
    async def figures(self) -> bytes:
        """The page for Prometheus."""
        now = time.time()
        self._totals.hear(self._process, self.tracing.metrics.snapshot(), now)
        return self._totals.page(now)

    @answering
    async def traces(self, limit: int, session: str | None) -> list[dict[str, Any]] | None:
        """The newest traces; None when they are exported elsewhere."""
        return None if self._spans is None else await asyncio.to_thread(self._spans.traces, limit, session)

    @answering
    async def trace(self, trace_id: str) -> list[SpanRow] | None:
        """The spans of a trace; None when they are exported elsewhere."""
        return None if self._spans is None else await asyncio.to_thread(self._spans.trace, trace_id)
