"""``/graphql``: the chat service's operations and this platform's own, over HTTP, server-sent events and WebSockets."""

from serve_app.api.graphql.router import graphql_router
from serve_app.api.graphql.schema import build_schema

__all__ = ["build_schema", "graphql_router"]
