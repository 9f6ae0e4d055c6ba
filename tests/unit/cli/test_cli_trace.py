"""``rotunda trace``: a waterfall of what a server tells."""

from __future__ import annotations

import httpx

from serve_app.cli.traces import BAR, bar
from tests.unit.cli.test_cli_models import answering, run


def span(name: str, start: float, length: float, **more: object) -> dict[str, object]:
    return {
        "name": name, "spanId": "1", "kind": "internal", "startMs": start, "durationMs": length, "status": "unset",
        "role": "ingress", "instance": "i", "attributes": {}, "links": [], "children": [], **more,
    }  # fmt: skip


LOAD = {"traceId": "b" * 32, "spanId": "2", "attributes": {"rotunda.link": "load"}}
DECODE = span("decode", 500, 500, attributes={"gen_ai.usage.output_tokens": 7})
FAILED = span("rotation.wait", 0, 250, status="error", attributes={"error.type": "TIMEOUT", "rotunda.evicting": ["x"]})
TRACE = {
    "traceId": "a" * 32,
    "start": 1.0,
    "durationMs": 1000.0,
    "spans": [span("POST /api/stream-message", 0, 1000, links=[LOAD], children=[FAILED, DECODE])],
}


def test_a_trace_is_a_waterfall() -> None:
    seen: list[httpx.Request] = []
    result = run(answering(200, TRACE, seen), "trace", "a" * 32)
    assert result.exit_code == 0, result.output
    assert seen[0].url.path == f"/traces/{'a' * 32}"
    title, _, root, failed, decode, link = result.stdout.splitlines()
    assert title == f"trace {'a' * 32}, 1,000.0 ms"
    assert root.split()[:3] == ["POST", "/api/stream-message", "1,000.0"]
    assert failed.startswith("   rotation.wait") and "evicting x, TIMEOUT" in failed
    assert "output_tokens 7" in decode
    assert decode.index("█") - root.index("█") == BAR // 2
    assert link == f"POST /api/stream-message -> load: trace {'b' * 32}"


def test_without_an_id_the_newest_are_listed() -> None:
    listed = {
        "traceId": "a" * 32, "name": "POST /x", "start": 1.0, "durationMs": 12.5, "error": None, "sessionId": "s",
        "spans": 14,
    }  # fmt: skip
    result = run(answering(200, {"traces": [listed]}), "trace")
    assert result.stdout.splitlines()[1].split() == ["a" * 32, "POST", "/x", "12.5", "14", "-", "s"]


def test_no_bar_is_invisible_and_none_too_long() -> None:
    for start in (0.0, 0.3, 0.999, 1.0):
        for length in (0.0, 0.001, 0.2, 1.0):
            drawn = bar(start, length)
            assert drawn.strip() and len(drawn) <= BAR, (start, length)
