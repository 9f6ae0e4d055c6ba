"""ASGI middleware that decides whether a request comes in at all: Host, Origin, API key."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.access import Access
from serve_app.api.context import CALLER, route_path
from serve_app.config import Settings
from serve_app.domain.errors import Forbidden

WITHOUT_KEY = frozenset({"/health"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class Gate:
    """Lets a request pass or raises ``Forbidden`` or ``Unauthenticated``; notes the caller in the scope.

    A foreign ``Host`` means DNS rebinding, a foreign ``Origin`` a page of another site that uses its visitor's way in:
    neither needs a password to do harm on a server that trusts its own machine.
    """

    def __init__(self, app: ASGIApp, settings: Settings, access: Access) -> None:
        self._app = app
        self._hosts = settings.allowed_hosts
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.cors_origins)
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            self._check_host(headers.get("host", ""))
            self._check_origin(scope, headers)
            self._check_key(scope, headers.get("authorization"))
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = _split_port(host.lower())[0]
        for allowed in self._hosts:
            if allowed == "*" or name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])):
                return
        raise Forbidden("This server is not called by this name. ALLOWED_HOSTS lists the names that it answers to.")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        preflight = "access-control-request-method" in headers
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS and not preflight:
            return
        origin = origin.lower()
        if origin not in self._origins and not _is_same(origin, headers.get("host", "").lower()):
            raise Forbidden("Pages of another site may not do this. CORS_ORIGINS lists the sites that may.")

    def _check_key(self, scope: Scope, authorization: str | None) -> None:
        path = route_path(scope)
        # A browser's WebSocket cannot send the header; connection_init brings the key (serve_app.api.graphql).
        later = scope["type"] == "websocket" and authorization is None
        if path in WITHOUT_KEY or (later and self._access.needs_key):
            return
        scope[CALLER] = self._access.caller(authorization)


def _split_port(host: str) -> tuple[str, int | None]:
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        return host, None
    return name, int(port)


def _is_same(origin: str, host: str) -> bool:
    """Whether the origin is the address that the request was sent to; default ports may be left out."""
    parts = urlsplit(origin)
    default = _PORTS.get(parts.scheme)
    if default is None or not parts.netloc:
        return False
    origin_name, origin_port = _split_port(parts.netloc)
    host_name, host_port = _split_port(host)
    return origin_name == host_name and (origin_port or default) == (host_port or default)
