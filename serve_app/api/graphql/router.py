"""GraphQL over HTTP (https://graphql.github.io/graphql-over-http/draft/), server-sent events and WebSockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from typing import Any, cast

from cross_web import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from strawberry.exceptions import ConnectionRejectionError
from strawberry.fastapi import GraphQLRouter
from strawberry.http import GraphQLHTTPResponse
from strawberry.http.base import BaseRequestProtocol
from strawberry.schema.exceptions import InvalidOperationTypeError
from strawberry.subscriptions import (
    GRAPHQL_SSE_PROTOCOL,
    GRAPHQL_TRANSPORT_WS_PROTOCOL,
    MULTIPART_SUBSCRIPTION_PROTOCOL,
)
from strawberry.subscriptions.protocols.graphql_transport_ws.handlers import BaseGraphQLTransportWSHandler
from strawberry.types import ExecutionResult
from strawberry.types.execution import PreExecutionError
from strawberry.types.unset import UNSET, UnsetType

from serve_app.api.context import trace_of
from serve_app.api.graphql import ide
from serve_app.api.graphql.context import Context
from serve_app.api.graphql.errors import extensions_of, translated
from serve_app.api.graphql.schema import build_schema
from serve_app.api.services import Services
from serve_app.api.validation import parse_json
from serve_app.domain.errors import MalformedRequest, RotundaError, Unauthenticated, UnsupportedMedia

PLAIN, GRAPHQL = "application/json", "application/graphql-response+json"
_REFUSED = "rotunda.graphql.refused"
"""Set in the scope of a request whose document was not executed."""


def graphql_router(services: Services) -> GraphQLRouter[Context, None]:
    """The routes of ``/graphql``."""

    async def context_of(connection: HTTPConnection) -> Context:
        return Context(services, connection)

    router = Router(
        build_schema(),
        path="/graphql",
        graphql_ide="graphiql",
        context_getter=context_of,
        subscription_protocols=(GRAPHQL_TRANSPORT_WS_PROTOCOL, GRAPHQL_SSE_PROTOCOL, MULTIPART_SUBSCRIPTION_PROTOCOL),
        connection_init_wait_timeout=timedelta(seconds=10),
        allowed_origins=services.settings.cors_origins,
        include_in_schema=False,
    )

    @router.get("/graphql/ide/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return ide.asset(name)

    return router


class WebSocketHandler(BaseGraphQLTransportWSHandler[Context, None]):
    """Answers messages of any shape; the library expects objects."""

    async def handle_message(self, message: Any) -> None:
        try:
            await super().handle_message(message)
        except (TypeError, AttributeError):
            await self.handle_invalid_message("Failed to parse message")


class ClosedStream(StreamingResponse):
    """Closes its source when the client leaves, and does not leave that to the garbage collector."""

    def __init__(self, source: Any, status_code: int, headers: Mapping[str, str]) -> None:
        super().__init__(source, status_code, headers)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


class Router(GraphQLRouter[Context, None]):
    """The library's view, with the content types and statuses of the specification."""

    graphql_transport_ws_handler_class = WebSocketHandler

    async def on_ws_connect(self, context: Context) -> UnsetType:
        try:
            context.admit()
        except Unauthenticated as error:
            raise ConnectionRejectionError from error
        # Unset, not None: clients refuse an acknowledgement whose payload is null.
        return cast("UnsetType", UNSET)

    def should_render_graphql_ide(self, request: BaseRequestProtocol) -> bool:
        """For a browser that opens the address; programs that take anything are answered as ever."""
        asked = "query" in request.query_params
        return request.method == "GET" and not asked and "text/html" in (request.headers.get("accept") or "")

    async def render_graphql_ide(self, request: Request) -> Any:
        return ide.page()

    def decode_json(self, data: str | bytes) -> object:
        try:
            return parse_json(data)
        except MalformedRequest as error:
            # The one error that the library knows how to answer.
            raise json.JSONDecodeError(error.message, "", 0) from error

    def parse_json(self, data: str | bytes) -> Any:
        value = super().parse_json(data)
        if value is not None and not isinstance(value, dict | list):
            raise HTTPException(400, "A request and its variables must be JSON objects")
        return value or {}

    async def run(self, request: Any, context: Any = UNSET, root_value: Any = UNSET) -> Any:
        if self.is_websocket_request(request):
            return await super().run(request, context, root_value)
        if request.method == "POST" and _media_type(request.headers.get("content-type", "")) != PLAIN:
            return self._refusal(request, UnsupportedMedia("Send the query as application/json."), 415)
        try:
            response = await super().run(cast("Request", request), context, root_value)
        except HTTPException as error:
            response = self._refused(request, error)
        return response if isinstance(response, FileResponse) else self._negotiated(request, response)

    async def process_result(self, request: Request, result: ExecutionResult) -> GraphQLHTTPResponse:
        trace_id = trace_of(request.scope).trace_id
        # Errors that arose outside the extensions come here untranslated.
        result.errors = [translated(error, trace_id) for error in result.errors or ()] or None
        response = await super().process_result(request, result)
        if isinstance(result, PreExecutionError) or (result.data is None and _of_the_request(result)):
            # No entry "data": nothing was executed.
            response.pop("data", None)
            request.scope[_REFUSED] = True
        return response

    async def create_streaming_response(
        self,
        request: Request,
        stream: Callable[[], AsyncIterator[str]],
        sub_response: Response,
        headers: Mapping[str, str],
    ) -> Response:
        return ClosedStream(stream(), sub_response.status_code or 200, {**sub_response.headers, **headers})

    def _refused(self, request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, InvalidOperationTypeError):
            return self._refusal(request, MalformedRequest(error.reason), 405, {"allow": "POST"})
        return self._refusal(request, MalformedRequest(error.reason), error.status_code)

    def _refusal(
        self, request: Request, failure: RotundaError, status: int, headers: Mapping[str, str] | None = None
    ) -> Response:
        trace_id = trace_of(request.scope).trace_id
        error = {"message": failure.message, "extensions": extensions_of(failure, trace_id)}
        body = self.encode_json({"errors": [error], "extensions": {"traceId": trace_id}})
        return Response(body, status, headers, PLAIN)

    def _negotiated(self, request: Request, response: Response) -> Response:
        if isinstance(response, StreamingResponse):
            return response
        wanted = preferred(request.headers.get("accept", ""))
        response.headers["content-type"] = f"{wanted}; charset=utf-8"
        if wanted == GRAPHQL and request.scope.get(_REFUSED):
            response.status_code = 400
        return response


def preferred(accept: str) -> str:
    """The media type of the answer to an ``Accept`` header: plain JSON unless the newer one is asked for."""
    quality: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (word.strip() for word in part.split(";"))
        given = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
        try:
            quality[name.lower()] = float(given[0]) if given else 1.0
        except ValueError:
            continue
    return GRAPHQL if quality.get(GRAPHQL, 0.0) > 0 and quality[GRAPHQL] >= quality.get(PLAIN, 0.0) else PLAIN


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _of_the_request(result: ExecutionResult) -> bool:
    """Whether every error is about the request itself, such as a variable of a wrong type: those have no path."""
    return bool(result.errors) and all(error.path is None for error in result.errors or ())
