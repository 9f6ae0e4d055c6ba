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

    def carrier(self) -> dict[str, str]:
        """The ``traceparent`` header for the next hop."""
        return {"traceparent": f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"}


def new_trace() -> TraceContext:
    return TraceContext(f"{_IDS.generate_trace_id():032x}", f"{_IDS.generate_span_id():016x}")


def from_carrier(carrier: Mapping[str, str]) -> TraceContext | None:
    """The context in a carrier, or None when it holds none that is valid."""
    span = trace.get_current_span(_PROPAGATOR.extract(dict(carrier))).get_span_context()
    if not span.is_valid:
        return None
    return TraceContext(f"{span.trace_id:032x}", f"{span.span_id:016x}", span.trace_flags.sampled)


def incoming(headers: Mapping[str, str], trust: bool) -> TraceContext:
    """The context of a request from outside: the caller's trace when ``trust`` is set, else a new one."""
    given = from_carrier({"traceparent": headers.get("traceparent", "")}) if trust else None
    return given or new_trace()
