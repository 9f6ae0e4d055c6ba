"""Errors as a GraphQL client sees them.

An expected failure keeps its words and gains ``extensions {code, message, retryable, traceId}``. Anything else is a
fault of ours: the original goes to the log under the trace id, and the client learns no more than that id.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

import strawberry
from graphql import GraphQLError
from strawberry.exceptions import StrawberryException
from strawberry.schema.exceptions import CannotGetOperationTypeError, InvalidOperationTypeError

from serve_app.domain.errors import Internal, MalformedRequest, RotundaError

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

_OF_THE_REQUEST = (CannotGetOperationTypeError, InvalidOperationTypeError, StrawberryException)


@strawberry.type(description="Why something expected did not work.")
class Failure:
    code: str
    message: str
    retryable: bool
    trace_id: str

    @classmethod
    def of(cls, error: RotundaError, trace_id: str) -> Failure:
        return cls(code=error.code, message=error.message, retryable=error.retryable, trace_id=trace_id)


async def outcome(work: Awaitable[_T], trace_id: str) -> _T | Failure:
    """What ``work`` gives, or its expected failure as a value. A fault of ours still raises."""
    try:
        return await work
    except Internal:
        raise
    except RotundaError as error:
        return Failure.of(error, trace_id)


def expected(error: GraphQLError) -> RotundaError | None:
    """The failure behind ``error`` in our own words; None for a fault."""
    original = root_cause(error)
    if isinstance(original, RotundaError):
        return original
    if isinstance(original, RecursionError):
        return MalformedRequest("The query is nested too deeply.")
    if original is None or isinstance(original, _OF_THE_REQUEST):
        return MalformedRequest(error.message)
    return None


def root_cause(error: GraphQLError) -> Exception | None:
    """The exception that a resolver raised; None when the error is GraphQL's own word about the request."""
    cause: Exception | None = error
    while isinstance(cause, GraphQLError):
        cause = cause.original_error
    return cause


def translated(error: GraphQLError, trace_id: str) -> GraphQLError:
    """``error`` as the client may see it; what is translated already comes back as it is."""
    if error.original_error is None and "code" in (error.extensions or {}):
        return error
    failure = expected(error) or Internal.masked()
    return GraphQLError(
        failure.message,
        nodes=error.nodes,
        source=error.source,
        positions=error.positions,
        path=error.path,
        extensions=extensions_of(failure, trace_id),
    )


def extensions_of(failure: RotundaError, trace_id: str) -> dict[str, Any]:
    """What a client may act on, beside the message."""
    extensions: dict[str, Any] = {
        "code": failure.code,
        "message": failure.message,
        "retryable": failure.retryable,
        "traceId": trace_id,
    }
    if failure.provider is not None:
        extensions["provider"] = failure.provider
    if failure.details:
        extensions["details"] = failure.details
    return extensions


def log_fault(error: GraphQLError, trace_id: str) -> None:
    """Log what the client will not see; expected failures are no news."""
    if expected(error) is None:
        logger.error("GraphQL fault at %s (trace %s)", error.path, trace_id, exc_info=root_cause(error))
