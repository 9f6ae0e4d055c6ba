"""Trails: who decides what is recorded, and what an end looks like."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.conversation import TerminationReason
from serve_app.domain.errors import DeadlineExceeded, InvalidInput, ProviderError, RotundaError
from serve_app.domain.generation import GenerationRequest, Message, Text
from serve_app.domain.routing import Candidate
from serve_app.telemetry import recording
from serve_app.telemetry.metrics import Totals
from serve_app.telemetry.pipeline import Counted, Outgoing
from serve_app.telemetry.propagation import TraceContext
from serve_app.telemetry.spans import SpanRow, rows_of
from serve_app.telemetry.tracing import Tracing

CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


def ended(tracing: Tracing) -> dict[str, SpanRow]:
    return {row.name: row for row in rows_of(tracing.outgoing.drain())}


def attributes(row: SpanRow) -> dict[str, object]:
    return dict(json.loads(row.body)["attributes"])


@pytest.fixture
def tracing() -> Tracing:
    return Tracing.set_up("ingress", "one", {})


def test_a_trusted_callers_trace_goes_on_and_another_ones_is_linked(tracing: Tracing) -> None:
    tracing.serve("trusted", CALLER, trust=True).end()
    tracing.serve("stranger", CALLER, trust=False).end()
    rows = ended(tracing)
    assert (rows["trusted"].trace_id, rows["trusted"].parent_id) == (CALLER.trace_id, CALLER.span_id)
    assert rows["trusted"].root and rows["stranger"].root
    assert rows["stranger"].trace_id != CALLER.trace_id
    [link] = json.loads(rows["stranger"].body)["links"]
    assert (link["traceId"], link["attributes"]) == (CALLER.trace_id, {"rotunda.link": "caller"})


@pytest.mark.parametrize(("sampled", "trust", "recorded"), [(False, True, 0), (False, False, 1), (True, True, 1)])
def test_a_callers_sampled_flag_counts_only_when_it_is_trusted(
    tracing: Tracing, sampled: bool, trust: bool, recorded: int
) -> None:
    given = TraceContext(CALLER.trace_id, CALLER.span_id, sampled)
    tracing.serve("request", given, trust).end()
    assert len(ended(tracing)) == recorded


@pytest.mark.parametrize(("ratio", "expected"), [("0.1", 100), ("0", 0), ("1", 1000)])
def test_the_ingress_decides_by_the_ratio_and_everybody_obeys(
    monkeypatch: pytest.MonkeyPatch, ratio: str, expected: int
) -> None:
    """Ids spread evenly: the sampler takes those whose low half lies below the ratio."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    ingress, replica = Tracing.set_up("ingress", "one", {}), Tracing.set_up("model", "two", {})
    ids = [f"{'ab' * 8}{number * 2**64 // 1000 + 2**52:016x}" for number in range(1000)]
    for id in ids:
        root = ingress.serve("request", TraceContext(id, CALLER.span_id), trust=True)
        replica.continued("generate", root.child("attempt").carrier()).end()
        root.end()
    wanted = {id for id in ids if int(id[16:], 16) < float(ratio) * 2**64}
    assert {row.trace_id for row in rows_of(ingress.outgoing.drain()) if row.name == "request"} == wanted
    assert {row.trace_id for row in rows_of(replica.outgoing.drain())} == wanted
    assert len(wanted) == expected


@pytest.mark.parametrize("variables", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_switched_off_nothing_is_recorded_but_traces_have_ids(variables: dict[str, str]) -> None:
    tracing = Tracing.set_up("ingress", "one", variables)
    trail = tracing.serve("request", None, trust=False)
    trail.child("below").end()
    trail.end()
    assert len(trail.trace_id) == 32 and int(trail.trace_id, 16)
    assert trail.carrier()["traceparent"].endswith("-00")
    assert not ended(tracing)


def test_a_span_of_a_known_session_is_found_by_its_record(tracing: Tracing) -> None:
    session = "0123456789abcdef0123456789abcdef"
    root = tracing.serve("request", None, trust=False)
    child = root.child("chat a", span_id=int(session[:16], 16))
    assert child.context == TraceContext.of_session(root.trace_id, session)


@pytest.mark.parametrize(
    ("error", "type", "said"),
    [
        (DeadlineExceeded.during("idle", 5), "TIMEOUT", "The model took longer"),
        (InvalidInput("'canary' is no number"), "INVALID_INPUT", "INVALID_INPUT"),
        (ProviderError("it said: canary"), "PROVIDER_ERROR", "PROVIDER_ERROR"),
        (ValueError("canary"), "INTERNAL", None),
    ],
)
def test_an_error_is_named_and_never_quotes_what_was_asked(
    tracing: Tracing, error: Exception, type: str, said: str | None
) -> None:
    with pytest.raises(error.__class__), tracing.alone("work").phase("part"):
        raise error
    row = ended(tracing)["part"]
    assert (row.status, attributes(row)["error.type"]) == (2, type)
    message = json.loads(row.body)["message"]
    assert message is None if said is None else message.startswith(said)
    assert "canary" not in row.body


async def test_whoever_leaves_cancels_and_fails_nothing(tracing: Tracing) -> None:
    root = tracing.alone("work")

    async def numbers() -> AsyncIterator[int]:
        with root.phase("generator"):
            yield 1
            yield 2

    async with aclosing(numbers()) as iterator:  # type: ignore[type-var]
        await anext(iterator)
    with pytest.raises(asyncio.CancelledError), root.phase("task"):
        raise asyncio.CancelledError
    for row in ended(tracing).values():
        assert (row.status, attributes(row)) == (0, {"rotunda.cancelled": True})


@pytest.mark.parametrize("request_ends_first", [True, False])
@pytest.mark.parametrize(
    ("failure", "stopped", "status"),
    [
        (None, None, "completed"),
        (DeadlineExceeded.during("idle", 5), None, "error"),
        (None, TerminationReason.CLIENT_DISCONNECTED, "terminated"),
    ],
)
def test_a_reply_ends_the_span_of_its_request(
    tracing: Tracing,
    request_ends_first: bool,
    failure: RotundaError | None,
    stopped: TerminationReason | None,
    status: str,
) -> None:
    root = tracing.serve("request", None, trust=False)
    root.keep("session", "conversation")
    if request_ends_first:
        root.end()
        assert not ended(tracing)
        root.finish(failure, stopped)
    else:
        root.finish(failure, stopped)
        assert not ended(tracing)
        root.note({"http.response.status_code": 200})
        root.end()
    row = ended(tracing)["request"]
    assert attributes(row)["rotunda.session.status"] == status
    assert attributes(row).get("rotunda.termination.reason") == (stopped.value if stopped else None)


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, False),
    ],
)
async def test_a_protocol_that_is_not_spoken_is_said_not_to_be(
    caplog: pytest.LogCaptureFixture, variables: dict[str, str], warned: bool
) -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
    await Tracing.set_up("ingress", "one", endpoint | variables).close()
    assert ("grpc is not supported" in caplog.text) is warned


def test_spans_that_were_exported_are_told_from_those_that_would_be_lost() -> None:
    answers = [SpanExportResult.FAILURE, SpanExportResult.SUCCESS]

    class Exporter(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return answers.pop()

    outgoing = Outgoing(keep=False)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(outgoing)
    tracer, counted = provider.get_tracer("test"), Counted(Exporter(), outgoing)
    spans = [tracer.start_span("one"), tracer.start_span("two"), tracer.start_span("three")]
    assert outgoing.unsent == 3
    for span in spans[:2]:
        span.end()
    assert (outgoing.open, outgoing.unsent) == (1, 3)
    counted.export(spans[:1])  # type: ignore[arg-type]
    assert (outgoing.exported, outgoing.refused, outgoing.unsent) == (1, 0, 2)
    counted.export(spans[1:2])  # type: ignore[arg-type]
    assert (outgoing.exported, outgoing.refused, outgoing.unsent) == (1, 1, 1)


def test_a_reply_that_another_ingress_goes_on_with_is_counted_there() -> None:
    tracing = Tracing.set_up("ingress", "one", {})
    root = tracing.serve("request", None, trust=False)
    root.keep("session", "conversation")
    root.hand_over()
    root.finish(None, None)
    root.end()
    assert attributes(ended(tracing)["request"])["rotunda.session.status"] == "moved"
    totals = Totals()
    totals.hear("one", tracing.metrics.snapshot(), 0)
    assert b"rotunda_sessions_total{" not in totals.page(0)


@pytest.mark.parametrize("sampled", [True, False])
def test_what_goes_on_with_a_trace_is_recorded_when_that_was(monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracing = Tracing.set_up("ingress", "one", {})
    carrier = TraceContext(CALLER.trace_id, CALLER.span_id, sampled).carrier()
    trail = tracing.going_on("adopt", carrier)
    trail.child("below").end()
    trail.end()
    rows = ended(tracing)
    assert set(rows) == ({"adopt", "below"} if sampled else set())
    assert all(row.trace_id != CALLER.trace_id for row in rows.values())
    tracing.alone("another").end()
    assert not ended(tracing)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_phases_stay_in_their_span_when_the_thread_loses_the_processor_between_two_clocks(
    tracing: Tracing, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    readings = iter(range(100))

    def time_ns() -> int:
        now = time.time_ns()
        if next(readings) == late:
            time.sleep(0.002)
        return now

    clocks = {"time_ns": time_ns, "monotonic_ns": time.monotonic_ns, "monotonic": time.monotonic}
    monkeypatch.setattr(recording, "time", SimpleNamespace(**clocks))
    asked = tracing.serve("ask", None, trust=False)
    hi = (Message("user", (Text("hi"),)),)
    given = GenerationRequest(request_id="r", model="m", messages=hi, trace=asked.carrier())
    with recording.in_replica(tracing, given, "m") as request:
        request.marks.started = request.marks.first = time.monotonic()
    rows = ended(tracing)
    whole = rows["generate m"]
    for phase in ("engine.queue", "prefill", "decode"):
        assert whole.start_ns <= rows[phase].start_ns <= rows[phase].end_ns <= whole.end_ns, phase


def test_an_attempt_begins_where_the_decision_ended_though_the_processor_was_away(tracing: Tracing) -> None:
    candidate = Candidate(Entry("m", "huggingface", "m", "model"), "m", ModelState.READY, "asked for")
    hi = (Message("user", (Text("hi"),)),)
    root = tracing.serve("ask", None, trust=False)
    latest: list[int] = []
    sent: list[int] = []

    def lose_the_processor() -> None:
        latest.append(time.time_ns())
        time.sleep(0.002)

    with recording.Record(root, GenerationRequest(request_id="r", model="m", messages=hi), time.monotonic) as record:
        with record.deciding():
            pass
        lose_the_processor()
        record.chosen((candidate,))
        for _ in range(2):
            with record.attempt(candidate):
                sent.append(int(record.carrier[recording.SENT]))
            lose_the_processor()
    root.end()
    rows = ended(tracing)
    decided, first, second = (rows[name] for name in ("route.decide", "attempt 1", "attempt 2"))
    assert rows["chat m"].start_ns == first.start_ns
    assert decided.end_ns <= first.start_ns <= latest[0]
    assert first.end_ns <= second.start_ns <= latest[1]
    assert sent == [first.start_ns, second.start_ns]
