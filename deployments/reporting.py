"""How spans and figures leave a process: with regular reports to the router (:mod:`deployments.desk`).

Where OTLP takes the spans, only the figures travel so.
"""

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray

from deployments.serving import RouterLink
from serve_app.telemetry.metrics import Metric, gauge
from serve_app.telemetry.spans import SpanRow, rows_of
from serve_app.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

REPORT_S = 1.0
LONGEST_SILENCE_S = 5.0
"""A report is sent after so long also when it says nothing new: whoever is silent for long counts as gone."""
LAST_REPORT_S = 1.0
"""How long a process that ends waits for the router to take its last report: it may be gone already."""
MOST_SPANS = 4096
"""In one report."""


@dataclass(frozen=True, slots=True)
class TelemetryReport:
    """What a process has recorded since its last report.

    ``figures``: its whole registry (:meth:`Metrics.snapshot`), None when nothing changed. ``unsent``: spans that are
    lost if it is killed now. ``leaves``: this is the last one.
    """

    process: str
    role: str
    spans: tuple[SpanRow, ...] = ()
    figures: bytes | None = None
    unsent: int = 0
    leaves: bool = False


class Reporter:
    """Records what one process does, and reports it.

    Args:
        role: ingress, model or upstream.
        link: to the router.
    """

    def __init__(self, role: str, link: RouterLink) -> None:
        self._role = role
        self._link = link
        self.tracing = Tracing.set_up(role, link.replica_id)
        process = ProcessFigures(role)
        self.node = process.node
        self.tracing.metrics.watch(process)
        self._unsent: list[SpanRow] = []
        self._figures = b""
        self._silent_s = 0.0

    async def report(self, leaves: bool = False) -> None:
        """Send what is new; what the router does not take is sent again with the next report."""
        outgoing = self.tracing.outgoing
        self._unsent += rows_of(outgoing.drain())
        figures = self.tracing.metrics.snapshot() if self.tracing.measures else b""
        changed = figures != self._figures
        self._silent_s += REPORT_S
        if not (self._unsent or changed or leaves or self._silent_s >= LONGEST_SILENCE_S):
            return
        spans, unsent = tuple(self._unsent[:MOST_SPANS]), outgoing.unsent + max(0, len(self._unsent) - MOST_SPANS)
        known = None if not changed else figures
        report = TelemetryReport(self._link.replica_id, self._role, spans, known, unsent, leaves)
        if await self._link.tell("telemetry", report):
            self._figures, self._silent_s = figures, 0.0
            del self._unsent[: len(spans)]

    async def close(self) -> None:
        """Flush: nothing that was recorded is lost when a process ends in order."""
        await self.tracing.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_REPORT_S):
                await self.report(leaves=True)


class ProcessFigures:
    """Memory of this process and of its node; sizes are rounded, so that a process at rest has nothing to report."""

    STEP = 2**20

    def __init__(self, role: str) -> None:
        self._process = psutil.Process()
        node = ray.get_runtime_context().get_node_id()
        self.node = f"{socket.gethostname()}-{node[:6]}"
        self._mine = (("node", self.node), ("role", role))

    def __call__(self) -> Iterator[Metric]:
        memory = psutil.virtual_memory()
        here = (("node", self.node),)
        resident = self._rounded(self._process.memory_info().rss)
        yield gauge("rotunda_process_resident_bytes", "Resident memory, all processes.", {self._mine: resident})
        yield gauge("rotunda_processes", "Living processes.", {self._mine: 1})
        free = self._rounded(memory.available, 64)
        yield gauge("rotunda_node_memory_free_bytes", "Memory of the node that is available.", {here: free})
        yield gauge("rotunda_node_memory_bytes", "Memory of the node.", {here: memory.total})

    def _rounded(self, size: int, steps: int = 1) -> float:
        return float(size // (steps * self.STEP) * steps * self.STEP)
