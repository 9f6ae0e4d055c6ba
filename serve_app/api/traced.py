"""The beginning of every trace: ASGI middleware that gives each request its place in one."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.context import TRACE, route_path
from serve_app.telemetry import semconv
from serve_app.telemetry.logs import about
from serve_app.telemetry.propagation import from_carrier
from serve_app.telemetry.tracing import Tracing, Trail

QUIET = ("/health", "/ready", "/metrics", "/traces")
"""Paths that are asked again and again by machines, and those that show traces: nothing is recorded of them."""
STARTS = frozenset({"http.response.start", "websocket.http.response.start", "websocket.accept"})


class Traced:
    """Outermost: begins the trace of a request, and tells its id (``x-trace-id``) and what took how long so far.

    A WebSocket carries many operations: each has a trace of its own (:mod:`serve_app.api.graphql.context`), and the
    connection none.

    Args:
        tracing: makes the spans.
        trust: whether a caller's ``traceparent`` is continued.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing, trust: bool = False) -> None:
        self._app = app
        self._tracing = tracing
        self._trust = trust

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        trail = scope[TRACE] = self._begin(scope)
        about(trace_id=trail.trace_id)

        async def send_traced(message: Message) -> None:
            if message["type"] in STARTS:
                _describe(trail, scope, message)
                message = {**message, "headers": [*message.get("headers", ()), *_headers(trail)]}
            await send(message)

        try:
            await self._app(scope, receive, send_traced)
        except BaseException as error:
            trail.end(error)
            raise
        else:
            trail.end()

    def _begin(self, scope: Scope) -> Trail:
        path = route_path(scope)
        if scope["type"] == "websocket" or path.startswith(QUIET):
            return Trail.quiet()
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), "")
        attributes = {semconv.HTTP_METHOD: scope["method"], semconv.URL_PATH: path}
        return self._tracing.serve(scope["method"], from_carrier({"traceparent": given}), self._trust, attributes)


def _describe(trail: Trail, scope: Scope, message: Message) -> None:
    """What is known once the answer begins: which route it was, and the status."""
    route = getattr(scope.get("route"), "path", None)
    if route is not None and scope["type"] == "http":
        trail.name(f"{scope['method']} {route}")
    trail.note({semconv.HTTP_ROUTE: route, semconv.HTTP_STATUS: message.get("status")})


def _headers(trail: Trail) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-trace-id", trail.trace_id.encode())]
    if trail.timings:
        told = ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in trail.timings.items())
        headers.append((b"server-timing", told.encode()))
    return headers
