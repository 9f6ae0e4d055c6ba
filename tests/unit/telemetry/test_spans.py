"""The embedded store: bounded, whole traces, readable in every form."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from serve_app.domain.errors import ProviderUnavailable
from serve_app.telemetry.formats import as_otlp, as_perfetto, as_tree
from serve_app.telemetry.spans import SpanRow, SpanStore, rows_of
from serve_app.telemetry.tracing import Tracing


def row(trace: int, span: int, start_s: float, seconds: float = 1.0, parent: int = 0) -> SpanRow:
    start = int(start_s * 1e9)
    body = json.dumps({"attributes": {}, "links": [], "message": None, "resource": {}})
    parent_id = f"{parent:016x}" if parent else ""
    end = start + int(seconds * 1e9)
    return SpanRow(f"{trace:032x}", f"{span:016x}", parent_id, "work", 1, start, end, 0, not parent, body)


def store(tmp_path: Path, most: int = 1000, age_s: float = 3600) -> SpanStore:
    return SpanStore(tmp_path / "data" / "traces.db", most, age_s)


def sweep(kept: SpanStore) -> None:
    kept._swept = float("-inf")
    kept.add([])


def test_traces_are_listed_newest_first_and_shown_whole(tmp_path: Path) -> None:
    kept, now = store(tmp_path), time.time()
    kept.add([row(1, 1, now), row(1, 2, now, 0.5, parent=1), row(2, 1, now + 1)])
    kept.add([row(1, 2, now, 0.5, parent=1)])  # a report that came twice
    assert [(each["traceId"][-1], each["spans"]) for each in kept.traces(10)] == [("2", 1), ("1", 2)]
    assert len(kept.traces(1)) == 1
    assert [each.span_id[-1] for each in kept.trace(f"{1:032x}")] == ["1", "2"]
    assert kept.trace("nonsense") == []


def test_beyond_the_most_spans_the_oldest_traces_go_and_none_is_cut(tmp_path: Path) -> None:
    kept, now = store(tmp_path, most=6), time.time()
    for trace in range(10):
        kept.add([row(trace, 1, now + trace), row(trace, 2, now + trace + 0.1, 0.5, parent=1)])
    sweep(kept)
    assert sorted(len(kept.trace(f"{trace:032x}")) for trace in range(10)) == [0] * 7 + [2] * 3
    assert len(kept.trace(f"{9:032x}")) == 2


def test_old_traces_go_and_one_that_lasts_stays(tmp_path: Path) -> None:
    kept, now = store(tmp_path, age_s=100), time.time()
    kept.add([row(1, 1, now - 200), row(2, 1, now - 200, 150), row(2, 2, now - 199, 1, parent=1), row(3, 1, now)])
    sweep(kept)
    assert [len(kept.trace(f"{trace:032x}")) for trace in (1, 2, 3)] == [0, 2, 1]


def test_a_store_can_be_opened_again(tmp_path: Path) -> None:
    first = store(tmp_path)
    first.add([row(1, 1, time.time())])
    first.save_figures([("one", time.time(), False, b"x"), ("two", time.time() - 999, True, b"y")])
    first.close()
    second = store(tmp_path)
    assert len(second.trace(f"{1:032x}")) == 1
    assert [each[0] for each in second.figures(time.time() - 60)] == ["one", "two"]
    assert second.figures(time.time() + 60) == []


@pytest.fixture
def rows() -> list[SpanRow]:
    """A failed attempt, its repetition, and a load that the root waited for."""
    tracing = Tracing.set_up("ingress", "one", {})
    load = tracing.alone("model.load a")
    root = tracing.serve("POST /x", None, trust=False)
    first = root.child("attempt 1", attributes={"rotunda.attempt": 1, "rotunda.evicting": ["b"], "x": 1.5, "y": True})
    first.end(ProviderUnavailable("gone"))
    root.child("attempt 2", links={"retried": first.context}).end()
    root.link("load", load.context)
    root.event("waits", {"rotunda.reason": "memory is full"})
    root.end()
    return rows_of(tracing.outgoing.drain())


def test_the_tree_has_children_below_their_parents(rows: list[SpanRow]) -> None:
    tree = as_tree(rows)
    [root] = tree["spans"]
    assert [child["name"] for child in root["children"]] == ["attempt 1", "attempt 2"]
    assert root["children"][0]["status"] == "error"
    assert root["children"][0]["attributes"]["error.type"] == "PROVIDER_UNAVAILABLE"
    assert root["children"][1]["links"][0]["spanId"] == root["children"][0]["spanId"]
    assert [link["attributes"]["rotunda.link"] for link in root["links"]] == ["load"]
    [event] = root["events"]
    assert (event["name"], event["attributes"]) == ("waits", {"rotunda.reason": "memory is full"})
    assert 0 <= event["atMs"] <= root["durationMs"]


def test_otlp_json_is_what_the_protocol_says(rows: list[SpanRow]) -> None:
    told = as_otlp(rows)
    for spans in (scope["spans"] for each in told["resourceSpans"] for scope in each["scopeSpans"]):
        for span in spans:  # protobuf's own JSON has bytes in base64, OTLP ids in hex
            for holder in (span, *span["links"]):
                for name in ("traceId", "spanId", "parentSpanId"):
                    if holder.get(name):
                        holder[name] = json_format.MessageToDict(_id(bytes.fromhex(holder[name])))["traceId"]
    data = json_format.ParseDict(told, TracesData())
    spans = [span for each in data.resource_spans for scope in each.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"POST /x", "attempt 1", "attempt 2"}
    first = next(span for span in spans if span.name == "attempt 1")
    assert {each.key for each in first.attributes} >= {"rotunda.attempt", "rotunda.evicting", "x", "y", "error.type"}
    assert {each.key for each in data.resource_spans[0].resource.attributes} >= {"service.name", "rotunda.role"}
    root = next(span for span in spans if span.name == "POST /x")
    [event] = root.events
    assert root.start_time_unix_nano <= event.time_unix_nano <= root.end_time_unix_nano
    assert (event.name, event.attributes[0].value.string_value) == ("waits", "memory is full")


def _id(value: bytes):  # type: ignore[no-untyped-def]
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    return Span(trace_id=value)


def test_perfetto_gets_complete_events_by_process(rows: list[SpanRow]) -> None:
    events = as_perfetto(rows)["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["ingress one"]
    assert {event["name"] for event in events if event["ph"] == "X"} == {"POST /x", "attempt 1", "attempt 2"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    assert [event["args"] for event in events if event["ph"] == "i"] == [{"rotunda.reason": "memory is full"}]
