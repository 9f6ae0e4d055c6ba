"""Spans: where they come from, and how they hang together across processes.

One :class:`Tracing` per process makes them; a :class:`Trail` is one open span. A trail is passed on as a value and
never becomes OpenTelemetry's current span: a context that is held across ``yield`` ends up in the wrong task. Between
processes it travels as a W3C carrier in the request.

The ingress decides once whether a trace is recorded (``OTEL_TRACES_SAMPLER``); everybody else obeys the flag in the
carrier. Spans leave through OTLP when ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or the one for traces) is set; otherwise they
wait in :class:`~serve_app.telemetry.pipeline.Outgoing` for the process's next report to the router, which keeps them
(:mod:`serve_app.telemetry.spans`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider, sampling
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from serve_app.domain.conversation import TerminationReason
from serve_app.domain.errors import InvalidInput, ProviderError, RotundaError
from serve_app.telemetry import semconv
from serve_app.telemetry.exporting import exports_elsewhere, otlp, resource_of
from serve_app.telemetry.logs import about
from serve_app.telemetry.metrics import Labels, Metric, Metrics, counter, gauge
from serve_app.telemetry.pipeline import Ids, OneDecision, Outgoing
from serve_app.telemetry.propagation import TraceContext, from_carrier, new_trace

logger = logging.getLogger(__name__)

SERVER, CLIENT, INTERNAL = SpanKind.SERVER, SpanKind.CLIENT, SpanKind.INTERNAL

Attributes = Mapping[str, AttributeValue | None]


class Tracing:
    """What makes the spans of a process; made by :meth:`set_up`. Pickles into nothing: each process sets up its own."""

    def __init__(
        self,
        provider: TracerProvider | None,
        outgoing: Outgoing,
        ids: Ids,
        decision: OneDecision | None = None,
        capture: bool = False,
    ) -> None:
        self._provider = provider
        self._decision = decision
        self._tracer = provider.get_tracer("rotunda") if provider else None
        self._ids = ids
        self.outgoing = outgoing
        self.metrics = Metrics()
        self.metrics.watch(self._figures)
        self.capture = capture
        """Whether spans may hold prompts and replies."""
        self.role = ""
        """What the process is in the platform."""
        self.measures = True
        """Whether figures are told."""

    def __repr__(self) -> str:
        return f"Tracing(on={self._provider is not None}, open={self.outgoing.open})"

    def _figures(self) -> Iterator[Metric]:
        outgoing = self.outgoing
        counts = {"ended": outgoing.ended, "dropped": outgoing.dropped, "refused": outgoing.refused}
        spans: dict[Labels, float] = {(("outcome", outcome),): float(count) for outcome, count in counts.items()}
        yield counter("rotunda_spans", "Spans of the living processes and what became of them.", spans)
        unsent: dict[Labels, float] = {(("role", self.role),): float(outgoing.unsent)}
        yield gauge("rotunda_spans_unsent", "Spans that would be lost if their processes were killed.", unsent)

    @classmethod
    def off(cls) -> Tracing:
        """Records nothing; traces still have ids."""
        return cls(None, Outgoing(keep=False), Ids())

    @classmethod
    def set_up(cls, role: str, instance: str, environ: Mapping[str, str] = os.environ) -> Tracing:
        """As the standard ``OTEL_*`` variables say.

        Args:
            role: ingress, router, model or upstream.
            instance: this process, unique in the cluster.
            environ: read for what is decided here; the SDK reads the rest from the process's own environment.
        """
        off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        made = cls.off() if off or _none(environ, "OTEL_TRACES_EXPORTER") else cls._made(role, instance, environ)
        made.role = role
        made.measures = not off and not _none(environ, "OTEL_METRICS_EXPORTER")
        return made

    @classmethod
    def _made(cls, role: str, instance: str, environ: Mapping[str, str]) -> Tracing:
        exports = exports_elsewhere(environ)
        ids, outgoing = Ids(), Outgoing(keep=not exports)
        decision = OneDecision(sampling._get_from_env_or_default())
        provider = TracerProvider(
            sampler=decision,
            resource=resource_of(role, instance, environ),
            shutdown_on_exit=False,  # the process's owner flushes, before its event loop is gone
            id_generator=ids,
        )
        provider.add_span_processor(outgoing)
        if exports:
            provider.add_span_processor(otlp(outgoing, environ))
        capture = environ.get(semconv.CAPTURE_CONTENT, "").strip().lower() in semconv.CAPTURE_IN_SPANS
        return cls(provider, outgoing, ids, decision, capture)

    def serve(self, name: str, given: TraceContext | None, trust: bool, attributes: Attributes | None = None) -> Trail:
        """The root of a request from outside. A trusted caller's trace goes on; another one's is linked."""
        parent, links = Context(), () if given is None else (_link(given, "caller"),)
        if given is not None and trust:
            parent, links = _context(given, remote=True), ()
        now = time.time_ns()
        trail = self._begin(name, SERVER, parent, links, attributes, start_ns=now)
        trail.began_ns = now
        return trail

    def going_on(self, name: str, carrier: Mapping[str, str]) -> Trail:
        """A trace of its own for work that goes on where another trace has ended, recorded if that one was."""
        given = from_carrier(carrier)
        if self._decision is None or given is None or not given.sampled:
            return Trail(new_trace(sampled=False), self)
        self._decision.decided = True
        trail = self._begin(name, INTERNAL, Context())
        self._decision.decided = False
        return trail

    def alone(self, name: str, attributes: Attributes | None = None) -> Trail:
        """A trace of its own, for work that belongs to no single request."""
        return self._begin(name, INTERNAL, Context(), (), attributes)

    def continued(self, name: str, carrier: Mapping[str, str], sent: str | None = None) -> Trail:
        """The span of a request that another process of the platform sent here.

        ``sent``: when it did, in nanoseconds since the epoch; the way here is a span ``call`` beside this one.
        """
        given = from_carrier(carrier)
        if given is None or not given.sampled:
            return Trail(given or new_trace(sampled=False), self)
        parent = _context(given, remote=False)
        now = time.time_ns()
        if sent is not None and int(sent) <= now:
            self._begin("call", INTERNAL, parent, start_ns=int(sent)).end(at_ns=now)
        return self._begin(name, SERVER, parent, start_ns=now)

    def _begin(
        self,
        name: str,
        kind: SpanKind,
        parent: Context,
        links: Sequence[Link] = (),
        attributes: Attributes | None = None,
        start_ns: int | None = None,
        span_id: int | None = None,
    ) -> Trail:
        if self._tracer is None:
            given = trace.get_current_span(parent).get_span_context()
            return Trail(_of(given) if given.is_valid else new_trace(sampled=False), self)
        self._ids.given = span_id
        span = self._tracer.start_span(name, parent, kind, _present(attributes), links, start_ns)
        self._ids.given = None
        return Trail(_of(span.get_span_context()), self, span if span.is_recording() else None)

    async def close(self) -> None:
        """Export what is left. Spans that wait for a report are still there afterwards: :meth:`Outgoing.drain`."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)


class Trail:
    """One open span, and the way to those below it. One that is not recorded costs next to nothing.

    :attr:`timings` are the seconds that its phases took, by name, recorded or not; :attr:`about` is what the reply's
    own span shall say of the request; :attr:`moved` whether another ingress goes on with the reply, and counts it;
    :attr:`began_ns` when a request from outside came.
    """

    __slots__ = (
        *("_ended_ns", "_kept", "_let_go", "_span", "_tracing"),
        *("about", "began_ns", "context", "moved", "timings"),
    )

    def __init__(self, context: TraceContext, tracing: Tracing | None = None, span: trace.Span | None = None) -> None:
        self.context = context
        self.timings: dict[str, float] = {}
        self.about: Attributes = {}
        self.began_ns: int | None = None
        self._tracing = tracing
        self._span = span
        self.moved = self._kept = self._let_go = False
        self._ended_ns: int | None = None

    def __repr__(self) -> str:
        return f"Trail({self.context}, recorded={self._span is not None})"

    @classmethod
    def quiet(cls) -> Trail:
        """A trace of which nothing is recorded; it has an id all the same."""
        return cls(new_trace(sampled=False))

    @property
    def trace_id(self) -> str:
        return self.context.trace_id

    @property
    def captures(self) -> bool:
        """Whether prompts and replies may be noted."""
        return self._span is not None and self._tracing is not None and self._tracing.capture

    @property
    def metrics(self) -> Metrics | None:
        """Of the process; None for a trail that belongs to none."""
        return self._tracing.metrics if self._tracing is not None and self._tracing.measures else None

    def carrier(self) -> dict[str, str]:
        """For the next hop."""
        return self.context.carrier()

    def child(
        self,
        name: str,
        kind: SpanKind = INTERNAL,
        links: Mapping[str, TraceContext] | None = None,
        attributes: Attributes | None = None,
        start_ns: int | None = None,
        span_id: int | None = None,
    ) -> Trail:
        """Begin a span below this one.

        Args:
            links: other spans, by what they are to this one (see ``semconv.LINK``).
            start_ns: when it began, if that is over already; nanoseconds since the epoch.
            span_id: its id, if that must be known elsewhere.
        """
        if self._span is None or self._tracing is None:
            return Trail(self.context, self._tracing)
        parent = trace.set_span_in_context(self._span, Context())
        found = [_link(context, what) for what, context in (links or {}).items()]
        return self._tracing._begin(name, kind, parent, found, attributes, start_ns, span_id)

    @contextmanager
    def phase(self, name: str, attributes: Attributes | None = None, since_ns: int | None = None) -> Iterator[Trail]:
        """A span around a block of code, which may yield to its consumer; how the block ends is noted.

        ``since_ns``: when it began, if that is a while ago; nanoseconds since the epoch.
        """
        began, child = time.monotonic(), self.child(name, attributes=attributes, start_ns=since_ns)
        if since_ns is not None:
            began -= (time.time_ns() - since_ns) / 1e9
        try:
            yield child
        except BaseException as error:
            child.end(error)
            raise
        else:
            child.end()
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.monotonic() - began

    def reading(self) -> AbstractContextManager[Trail]:
        """The phase ``request.read``, which began when the request came."""
        return self.phase("request.read", since_ns=self.began_ns)

    def past(self, name: str, start_ns: int, end_ns: int, attributes: Attributes | None = None) -> None:
        """A span below this one that is over already."""
        self.child(name, attributes=attributes, start_ns=start_ns).end(at_ns=max(start_ns, end_ns))

    def note(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.set_attributes(_present(attributes))

    def event(self, name: str, attributes: Attributes) -> None:
        """Note that something has happened now."""
        if self._span is not None:
            self._span.add_event(name, _present(attributes))

    def name(self, name: str) -> None:
        """Give the span another name, when it is known only later."""
        if self._span is not None:
            self._span.update_name(name)

    def link(self, what: str, context: TraceContext) -> None:
        """Point to another span; ``what`` it is to this one."""
        if self._span is not None:
            link = _link(context, what)
            self._span.add_link(link.context, link.attributes)

    def follows(self, trace_id: str | None, session_id: str) -> None:
        """The work goes on with a session that another trace began."""
        self.note({semconv.SESSION: session_id})
        about(session=session_id)
        if trace_id:
            self.link("session", TraceContext.of_session(trace_id, session_id))

    def fail(self, error: BaseException) -> None:
        """Note how the work ended: an error by its code, an end that somebody wanted as cancelled."""
        if self._span is None:
            return
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._span.set_attribute(semconv.CANCELLED, True)
            return
        self._span.set_attribute(semconv.ERROR_TYPE, error_type(error))
        self._span.set_status(Status(StatusCode.ERROR, unquoted(error) if isinstance(error, RotundaError) else None))
        if not isinstance(error, RotundaError):
            self._span.set_attribute(semconv.EXCEPTION_TYPE, type(error).__qualname__)

    def refuse(self, error: RotundaError) -> None:
        """Note the error that a request is answered with; a caller's own mistake does not make the span a failure."""
        if error.status >= 500:
            self.fail(error)
        else:
            self.note({semconv.ERROR_TYPE: error_type(error)})

    def keep(self, session: str, conversation: str) -> None:
        """A reply takes the span over, which ends with :meth:`finish` of that reply, and neither sooner nor later."""
        self._kept = True
        about(session=session)
        self.about = {semconv.CONVERSATION: conversation}
        self.note({semconv.SESSION: session})

    def hand_over(self) -> None:
        """Another ingress goes on with the reply: its end is counted there, with all its tokens."""
        self.moved = True

    def finish(self, failure: RotundaError | None, stopped: TerminationReason | None) -> None:
        """The reply that took the span over ends now. What its request has to say may follow until :meth:`end`."""
        self._ended_ns = time.time_ns()
        status, reason = ("moved" if self.moved else "completed"), ""
        if failure is not None:
            self.fail(failure)
            status, reason = "error", error_type(failure)
        elif stopped is not None:
            self.note({semconv.CANCELLED: True, semconv.TERMINATION_REASON: stopped.value})
            status, reason = "terminated", stopped.value
        self.note({semconv.SESSION_STATUS: status})
        if self.metrics is not None and not self.moved:
            self.metrics.session_ended(status, reason)
        if self._let_go:
            self.end()

    def end(self, error: BaseException | None = None, at_ns: int | None = None) -> None:
        """End the span. One that a reply has taken over waits for that; one that has ended stays as it is."""
        if self._span is None:
            return
        if error is not None:
            self.fail(error)
        if self._kept and self._ended_ns is None:
            self._let_go = True
            return
        self._span.end(self._ended_ns or at_ns)
        self._span = None


def error_type(error: BaseException) -> str:
    """The same on spans and on metrics: the code that clients see."""
    return error.code if isinstance(error, RotundaError) else "INTERNAL"


def unquoted(error: RotundaError) -> str:
    """An error for a log or a span: in words, but for those that may quote what was asked or answered."""
    return error.code if isinstance(error, InvalidInput | ProviderError) else error.message


def _none(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() == "none"


def _of(context: SpanContext) -> TraceContext:
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)


def _span_context(context: TraceContext, remote: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), remote, flags)


def _context(context: TraceContext, remote: bool) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(_span_context(context, remote)), Context())


def _link(context: TraceContext, what: str) -> Link:
    return Link(_span_context(context, remote=True), {semconv.LINK: what})


def _present(attributes: Attributes | None) -> dict[str, AttributeValue]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}
