"""One trace for every kind of reader: a tree for people, OTLP/JSON for backends, Perfetto for a timeline."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from serve_app.telemetry import semconv
from serve_app.telemetry.spans import SpanRow

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
STATUSES = ("unset", "ok", "error")


def as_tree(rows: Sequence[SpanRow]) -> dict[str, Any]:
    """The spans below their parents; times in ms since the first span began.

    A span whose parent is not here (a trusted caller's, or one that was lost) stands at the top.
    """
    known, first = {row.span_id for row in rows}, min(row.start_ns for row in rows)
    below: dict[str, list[SpanRow]] = defaultdict(list)
    for row in rows:
        below[row.parent_id if row.parent_id in known else ""].append(row)

    def node(row: SpanRow) -> dict[str, Any]:
        body = json.loads(row.body)
        return {
            "name": row.name,
            "spanId": row.span_id,
            "kind": KINDS[row.kind],
            "startMs": round((row.start_ns - first) / 1e6, 3),
            "durationMs": round((row.end_ns - row.start_ns) / 1e6, 3),
            "status": STATUSES[row.status],
            "role": body["resource"].get(semconv.ROLE),
            "instance": body["resource"].get(semconv.SERVICE_INSTANCE),
            "attributes": body["attributes"],
            "links": body["links"],
            "events": [
                {
                    "name": event["name"],
                    "atMs": round((event["at"] - first) / 1e6, 3),
                    "attributes": event["attributes"],
                }
                for event in _events(body)
            ],
            "children": [node(child) for child in below[row.span_id]],
        }

    return {
        "traceId": rows[0].trace_id,
        "start": first / 1e9,
        "durationMs": round((max(row.end_ns for row in rows) - first) / 1e6, 3),
        "spans": [node(row) for row in below[""]],
    }


def as_otlp(rows: Sequence[SpanRow]) -> dict[str, Any]:
    """OTLP/JSON (https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding), as a collector takes it."""

    def resource(row: SpanRow) -> str:
        return json.dumps(json.loads(row.body)["resource"], sort_keys=True)

    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _key_values(json.loads(of))},
                "scopeSpans": [{"scope": {"name": "rotunda"}, "spans": [_otlp_span(row) for row in group]}],
            }
            for of, group in groupby(sorted(rows, key=resource), key=resource)
        ]
    }


def _otlp_span(row: SpanRow) -> dict[str, Any]:
    body = json.loads(row.body)
    return {
        "traceId": row.trace_id,
        "spanId": row.span_id,
        "parentSpanId": row.parent_id,
        "name": row.name,
        "kind": row.kind,
        "startTimeUnixNano": str(row.start_ns),
        "endTimeUnixNano": str(row.end_ns),
        "attributes": _key_values(body["attributes"]),
        "links": [{**link, "attributes": _key_values(link["attributes"])} for link in body["links"]],
        "events": [
            {
                "name": event["name"],
                "timeUnixNano": str(event["at"]),
                "attributes": _key_values(event["attributes"]),
            }
            for event in _events(body)
        ],
        "status": {"code": row.status, **({"message": body["message"]} if body["message"] else {})},
    }


def _events(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What happened during the span; spans that an earlier version stored tell none."""
    return list(body.get("events", ()))


def _key_values(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in attributes.items() if value is not None]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(part) for part in value]}}
    return {"stringValue": str(value)}


def as_perfetto(rows: Sequence[SpanRow]) -> dict[str, Any]:
    """Chrome's trace event format, which https://ui.perfetto.dev opens: a process per replica, complete events."""
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    for row in rows:
        body = json.loads(row.body)
        resource = body["resource"]
        name = f"{resource.get(semconv.ROLE)} {resource.get(semconv.SERVICE_INSTANCE)}"
        if name not in processes:
            processes[name] = len(processes) + 1
            named = {"ph": "M", "name": "process_name", "pid": processes[name], "tid": 0, "args": {"name": name}}
            events.append(named)
        events.append(
            {
                "ph": "X",
                "name": row.name,
                "cat": KINDS[row.kind],
                "ts": row.start_ns / 1000,
                "dur": (row.end_ns - row.start_ns) / 1000,
                "pid": processes[name],
                "tid": 1,
                "args": {**body["attributes"], "status": STATUSES[row.status]},
            }
        )
        events += [
            {
                "ph": "i",
                "s": "t",
                "name": event["name"],
                "ts": event["at"] / 1000,
                "pid": processes[name],
                "tid": 1,
                "args": event["attributes"],
            }
            for event in _events(body)
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
