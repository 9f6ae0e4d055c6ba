"""The W3C trace context that travels with every request, as an explicit dict (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_IDS = RandomIdGenerator()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A position in a trace: 32 and 16 hex digits, and whether the trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def of_session(cls, trace_id: str, session_id: str) -> TraceContext:
        """Where a stream session's reply stands in its trace, for whoever knows no more than the session's record.

        The span ``chat {model}`` takes its id from the random id of its request, which is the session's.
        """
        return cls(trace_id, session_id[:16])

    def carrier(self) -> dict[str, str]:
        """The ``traceparent`` header for the next hop."""
        return {"traceparent": f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"}


def new_trace(sampled: bool = True) -> TraceContext:
    return TraceContext(f"{_IDS.generate_trace_id():032x}", f"{_IDS.generate_span_id():016x}", sampled)


def from_carrier(carrier: Mapping[str, str]) -> TraceContext | None:
    """The context in a carrier, or None when it holds none that is valid."""
    span = trace.get_current_span(_PROPAGATOR.extract(dict(carrier))).get_span_context()
    if not span.is_valid:
        return None
    return TraceContext(f"{span.trace_id:032x}", f"{span.span_id:016x}", span.trace_flags.sampled)
