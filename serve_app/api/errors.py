"""Errors as HTTP clients see them: the one mapping, and the boundary that nothing gets past.

An expected failure keeps its words. Anything else is a fault of ours: it is logged under the trace id, and the client
learns no more than that id.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.context import route_path, trace_of
from serve_app.api.validation import in_words
from serve_app.domain.errors import (
    Forbidden,
    Internal,
    InvalidInput,
    MalformedRequest,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    RotundaError,
    Unauthenticated,
    UnsupportedMedia,
)

logger = logging.getLogger(__name__)

_BY_STATUS: dict[int, type[RotundaError]] = {
    kind.status: kind
    for kind in (
        MalformedRequest,
        Unauthenticated,
        Forbidden,
        NotFound,
        PayloadTooLarge,
        UnsupportedMedia,
        InvalidInput,
        RateLimited,
    )
}
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


OLLAMA_PATHS = frozenset(
    f"/api/{name}"
    for name in ("chat", "delete", "embed", "embeddings", "generate", "ps", "pull", "show", "tags", "version")
)
"""Where an error is a plain text, as its clients read it."""


def error_json(error: RotundaError, trace_id: str) -> dict[str, Any]:
    """The platform's own envelope."""
    body: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "provider": error.provider,
        "retryable": error.retryable,
        "traceId": trace_id,
    }
    return {"error": {**body, "details": error.details} if error.details else body}


def openai_json(error: RotundaError, trace_id: str) -> dict[str, Any]:
    """The envelope that OpenAI's clients read; ``code`` is the platform's own, and ``trace_id`` is added."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(error.status, kind),
            "param": error.details.get("param"),
            "code": error.code,
            "trace_id": trace_id,
        }
    }


def error_response(
    scope: Scope, error: RotundaError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer to a request that failed, in the envelope of the protocol that its path belongs to."""
    added = dict(headers or {})
    trace_of(scope).refuse(error)
    if error.retry_after_s is not None:
        added["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        added["www-authenticate"] = "Bearer"
    if route_path(scope) in OLLAMA_PATHS:
        body: dict[str, Any] = {"error": error.message}
    elif route_path(scope).startswith("/v1/"):
        body = openai_json(error, trace_of(scope).trace_id)
        if not error.retryable:
            added["x-should-retry"] = "false"  # its clients would repeat some of them, 409 and 5xx
    else:
        body = error_json(error, trace_of(scope).trace_id)
    return JSONResponse(body, status or error.status, added)


def install(app: FastAPI) -> None:
    """Make the application answer its own and its framework's errors through the mapping."""

    async def on_failure(request: Request, error: Exception) -> Response:
        assert isinstance(error, RotundaError)
        return error_response(request.scope, error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _http_exception(request.scope, error)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request.scope, InvalidInput(in_words(error.errors())))

    app.add_exception_handler(RotundaError, on_failure)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_invalid)


def _http_exception(scope: Scope, error: HTTPException) -> Response:
    path, method = route_path(scope), scope.get("method", "GET")
    kind = _BY_STATUS.get(error.status_code, MalformedRequest if error.status_code < 500 else Internal)
    if error.status_code == HTTPStatus.NOT_FOUND:
        failure = kind(f"There is nothing at {method} {path}.")
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        failure = kind(f"{path} does not take {method}.")
    elif kind is Internal:
        failure = Internal.masked()
    else:
        failure = kind(str(error.detail))
    return error_response(scope, failure, error.status_code, error.headers)


class Boundary:
    """ASGI middleware: whatever the application raises becomes an answer, unless one has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except ClientDisconnect:
            return
        except Exception as error:
            if not isinstance(error, RotundaError):
                logger.exception("%s failed (trace %s)", route_path(scope), trace_of(scope).trace_id)
            if begun:
                raise  # the server breaks the connection off: better than an end that looks whole
            await _answer(scope, receive, send, error if isinstance(error, RotundaError) else Internal.masked())


async def _answer(scope: Scope, receive: Receive, send: Send, error: RotundaError) -> None:
    if scope["type"] == "http":
        await error_response(scope, error)(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        response = error_response(scope, error)
        head = {"status": response.status_code, "headers": response.raw_headers}
        await send({"type": "websocket.http.response.start", **head})
        await send({"type": "websocket.http.response.body", "body": bytes(response.body)})
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": error.code})
