"""The schema, and what happens around every operation on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import strawberry
from graphql import GraphQLError
from strawberry.extensions import MaskErrors, ParserCache
from strawberry.types import ExecutionContext

from serve_app.api.graphql.context import Context
from serve_app.api.graphql.errors import log_fault, translated
from serve_app.api.graphql.events import EVENT_TYPES
from serve_app.api.graphql.limits import DocumentLimits
from serve_app.api.graphql.mutations import Mutation
from serve_app.api.graphql.queries import Query
from serve_app.api.graphql.subscriptions import Subscription

PRINTED = Path(__file__).with_name("schema.graphql")
"""The schema in its own language; ``python -m serve_app.api.graphql`` writes it, a test compares it."""


class Outcome(MaskErrors):
    """Gives each operation its context, its errors their form, and its result the trace id."""

    def __init__(self) -> None:
        super().__init__()

    def on_operation(self) -> Iterator[None]:
        context = self.execution_context.context
        if isinstance(context, Context):
            context = self.execution_context.context = context.for_operation()
        try:
            yield from super().on_operation()
        finally:
            if isinstance(context, Context) and context.is_websocket:
                context.trace.end()

    def anonymise_error(self, error: GraphQLError) -> GraphQLError:
        return translated(error, trace_id_of(self.execution_context))

    def get_results(self) -> dict[str, Any]:
        return {"traceId": trace_id_of(self.execution_context)}


class Schema(strawberry.Schema):
    def process_errors(self, errors: list[GraphQLError], execution_context: ExecutionContext | None = None) -> None:
        """Log the faults before they are masked."""
        for error in errors:
            log_fault(error, trace_id_of(execution_context))


def trace_id_of(execution_context: ExecutionContext | None) -> str:
    context = execution_context.context if execution_context else None
    return context.trace.trace_id if isinstance(context, Context) else ""


def build_schema() -> Schema:
    """The one schema that is served; ``schema.graphql`` beside this module is its printed form."""
    return Schema(
        query=Query,
        mutation=Mutation,
        subscription=Subscription,
        types=EVENT_TYPES,
        extensions=[Outcome, ParserCache, DocumentLimits],
    )
