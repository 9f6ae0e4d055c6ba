"""Traces on the running product with nothing installed beside it: the router keeps them, everybody can see them."""

from __future__ import annotations

from typing import Any

import httpx
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from typer.testing import CliRunner

from serve_app.cli.app import app
from tests.cluster import Cluster, sse_events, wait_until
from tests.e2e.test_chat import Reply

MODEL = "test/scripted"
ENDED = {"POST /api/stream-message", f"chat {MODEL}", f"generate {MODEL}", "decode"}


def get(cluster: Cluster, path: str) -> Any:
    answer = httpx.get(f"{cluster.url}{path}", timeout=30)
    return answer.json() if answer.status_code == 200 else None


def names(spans: list[dict[str, Any]]) -> set[str]:
    return {span["name"] for span in spans}.union(*(names(span["children"]) for span in spans))


def test_a_reply_can_be_looked_at_in_every_form(cluster: Cluster) -> None:
    body = {"message": "[[tokens=12 pace=0.01]]", "model": MODEL}
    with cluster.client() as client, client.stream("POST", "/api/stream-message", json=body) as answer:
        reply = Reply(list(sse_events(answer.iter_lines())))
        id = answer.headers["x-trace-id"]
        assert "request.read;dur=" in answer.headers["server-timing"]
    session = reply.of("session")["sessionId"]

    def whole() -> dict[str, Any] | None:
        tree = get(cluster, f"/traces/{id}")
        return tree if tree and names(tree["spans"]) >= ENDED else None

    tree = wait_until(whole, 30, what="the spans of both processes")
    [root] = tree["spans"]
    assert (root["name"], root["role"], root["status"]) == ("POST /api/stream-message", "ingress", "unset")
    [listed] = get(cluster, f"/traces?session={session}")["traces"]
    assert (listed["traceId"], listed["sessionId"], listed["error"]) == (id, session, None)
    assert id in [each["traceId"] for each in get(cluster, "/traces?limit=1000")["traces"]]
    exported = get(cluster, f"/traces/{id}?format=otlp")
    for each in exported["resourceSpans"]:  # protobuf's own JSON would have these ids in base64
        for span in (span for scope in each["scopeSpans"] for span in scope["spans"]):
            for field in ("traceId", "spanId", "parentSpanId", "links"):
                del span[field]
    data = json_format.ParseDict(exported, TracesData())
    assert {span.name for each in data.resource_spans for scope in each.scope_spans for span in scope.spans} >= ENDED
    events = get(cluster, f"/traces/{id}?format=perfetto")["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= ENDED
    assert len({event["pid"] for event in events}) == 2
    shown = CliRunner().invoke(app, ["trace", id, "--url", cluster.url])
    assert shown.exit_code == 0 and all(name in shown.stdout for name in ENDED), shown.output


def test_a_trace_that_is_not_there_is_said_not_to_be(cluster: Cluster) -> None:
    answer = httpx.get(f"{cluster.url}/traces/{'0' * 32}", timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "NOT_FOUND")
    assert error["traceId"] == answer.headers["x-trace-id"]
