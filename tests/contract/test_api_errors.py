"""The boundary: every answer has a trace id, every error the envelope, and no fault shows its cause."""

from __future__ import annotations

import logging

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve_app.api.errors import Boundary
from serve_app.api.traced import Traced
from serve_app.domain.errors import RateLimited
from serve_app.domain.fleet import FleetView
from serve_app.telemetry.tracing import Tracing
from tests.contract.conftest import MakePlatform
from tests.doubles import LocalPlatform

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/health", 200, None),
        ("GET", "/api/models", 200, None),
        ("GET", "/nowhere", 404, "NOT_FOUND"),
        ("GET", "/docs", 404, "NOT_FOUND"),
        ("GET", "/openapi.json", 404, "NOT_FOUND"),
        ("GET", "/api/terminate-stream", 405, "MALFORMED_REQUEST"),
        ("DELETE", "/api/models", 405, "MALFORMED_REQUEST"),
        ("POST", "/api/stream-message", 415, "UNSUPPORTED_MEDIA"),
    ],
)
async def test_every_answer_has_a_trace_id_and_every_error_the_envelope(
    api: httpx.AsyncClient, method: str, path: str, status: int, code: str | None
) -> None:
    response = await api.request(method, path)
    assert response.status_code == status
    assert len(response.headers.get_list("x-trace-id")) == 1
    assert len(response.headers["x-trace-id"]) == 32
    if code is not None:
        error = response.json()["error"]
        assert set(error) == {"code", "message", "provider", "retryable", "traceId"}
        assert (error["code"], error["traceId"]) == (code, response.headers["x-trace-id"])


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_callers_trace_is_continued_only_when_trusted(make_platform: MakePlatform, trusted: bool) -> None:
    platform = await make_platform(trust_traceparent=trusted)
    async with platform.client(traceparent=PARENT) as api:
        response = await api.post("/api/stream-message", json={"message": "hello [[tokens=1]]"})
    assert (response.headers["x-trace-id"] == TRACE) is trusted
    assert platform.backend.requests[-1].trace["traceparent"].split("-")[1] == response.headers["x-trace-id"]


async def test_a_fault_is_logged_under_its_trace_id_and_masked(
    platform: LocalPlatform, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> FleetView:
        raise ValueError("password=hunter2")

    monkeypatch.setattr(platform.router, "view", broken)
    with caplog.at_level(logging.ERROR):
        for path in ("/api/models", "/v1/models"):
            response = await api.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (500, "INTERNAL")
            assert "hunter2" not in response.text and "ValueError" not in response.text
            assert response.headers["x-trace-id"] in caplog.text
    assert "hunter2" in caplog.text


async def test_an_expected_failure_says_when_to_come_back(
    platform: LocalPlatform, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy() -> FleetView:
        raise RateLimited("Too many.", details={"retryAfterS": 7})

    monkeypatch.setattr(platform.router, "view", busy)
    ours = await api.get("/api/models")
    assert (ours.status_code, ours.headers["retry-after"], ours.json()["error"]["retryable"]) == (429, "7", True)
    theirs = await api.get("/v1/models")
    assert (theirs.status_code, theirs.headers["retry-after"]) == (429, "7")
    assert "x-should-retry" not in theirs.headers


async def test_a_fault_after_the_first_byte_breaks_the_answer_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("too late")

    sent: list[str] = []

    async def send(message: object) -> None:
        sent.append(message["type"])  # type: ignore[index]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    with pytest.raises(ValueError, match="too late"):
        await Traced(Boundary(app), Tracing.off())(scope, receive, send)  # type: ignore[arg-type]
    assert sent == ["http.response.start"]
