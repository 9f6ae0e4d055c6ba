"""What stands behind the spans of a process: who is recorded, under which ids, and where ended spans wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, sampling
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Link, SpanKind

MOST_WAITING = 8192
"""Ended spans that wait for the next report; more are dropped and counted."""


class OneDecision(sampling.Sampler):
    """Asks the configured sampler for traces that begin here; whatever hangs below a span of ours follows it.

    A parent from outside the platform is marked as remote, and is no span of ours. Where the next trace goes on with
    one that is recorded, :attr:`decided` is true: then nothing is left to ask.
    """

    decided = False

    def __init__(self, configured: sampling.Sampler) -> None:
        self._configured = configured

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: Any = None,
    ) -> sampling.SamplingResult:
        parent = trace.get_current_span(parent_context).get_span_context()
        if parent.is_valid and not parent.is_remote:
            decision = sampling.Decision.RECORD_AND_SAMPLE if parent.trace_flags.sampled else sampling.Decision.DROP
            return sampling.SamplingResult(decision, attributes)
        if self.decided:
            return sampling.SamplingResult(sampling.Decision.RECORD_AND_SAMPLE, attributes)
        return self._configured.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"OneDecision({self._configured.get_description()})"


class Ids(RandomIdGenerator):
    """Random ids, but for a span whose id must be known elsewhere (see :meth:`TraceContext.of_session`)."""

    given: int | None = None

    def generate_span_id(self) -> int:
        given, self.given = self.given, None
        return given or super().generate_span_id()


class Outgoing(SpanProcessor):
    """Counts the spans of the process and, where nothing exports them, holds the ended ones for its next report."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._ended: deque[ReadableSpan] = deque()
        self.started = self.ended = self.dropped = 0
        self.exported = self.refused = 0
        """Where they are exported: those that the other side took, and those that it did not."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.started += 1

    def on_end(self, span: ReadableSpan) -> None:
        self.ended += 1
        if not self._keep:
            return
        if len(self._ended) < MOST_WAITING:
            self._ended.append(span)
        else:
            self.dropped += 1

    @property
    def open(self) -> int:
        """Spans that have begun and not ended."""
        return self.started - self.ended

    @property
    def unsent(self) -> int:
        """Spans that are lost if the process is killed now: open ones, and ended ones that have not left it."""
        return self.open + (len(self._ended) if self._keep else self.ended - self.exported - self.refused)

    def drain(self) -> list[ReadableSpan]:
        """The spans that ended since the last call."""
        ended, self._ended = self._ended, deque()
        return list(ended)


class Counted(SpanExporter):
    """Another exporter, whose success :class:`Outgoing` counts."""

    def __init__(self, exporter: SpanExporter, outgoing: Outgoing) -> None:
        self._exporter = exporter
        self._outgoing = outgoing

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._outgoing.exported += len(spans)
        else:
            self._outgoing.refused += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)
