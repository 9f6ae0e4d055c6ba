"""What is known about a request beside its body: trace, caller, address and proof of access.

The middleware writes trace and caller into the ASGI scope (:mod:`serve_app.api.gate`, :mod:`serve_app.api.errors`);
the surfaces read them here.
"""

from __future__ import annotations

from starlette.requests import HTTPConnection
from starlette.types import Scope

from serve_app.telemetry.tracing import Trail

TRACE = "rotunda.trace"
CALLER = "rotunda.caller"
TOKEN_HEADER = "x-conversation-token"


def trace_of(scope: Scope) -> Trail:
    """The trace of a request; a new one when it came past the middleware."""
    trace = scope.get(TRACE)
    if not isinstance(trace, Trail):
        trace = scope[TRACE] = Trail.quiet()
    return trace


def caller_of(connection: HTTPConnection) -> str | None:
    """Who calls: the fingerprint of the API key, or "anonymous" where none is wanted.

    None for a WebSocket that has not shown a key yet (it may in ``connection_init``: :meth:`Access.caller`).
    """
    caller: str | None = connection.scope.get(CALLER)
    return caller


def address_of(connection: HTTPConnection) -> str:
    """The network address that the connection came from; the limit on password attempts counts by it."""
    return connection.client.host if connection.client else "unknown"


def token_of(connection: HTTPConnection) -> str | None:
    """The conversation or image token of a request: ``X-Conversation-Token``, else ``?token=``."""
    return connection.headers.get(TOKEN_HEADER) or connection.query_params.get("token") or None


def route_path(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path
