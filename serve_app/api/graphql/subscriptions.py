"""What can be followed: replies, and the fleet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import strawberry

from serve_app.api.graphql.context import Context
from serve_app.api.graphql.events import StreamEvent, event_of
from serve_app.api.graphql.inputs import MessageInput
from serve_app.api.graphql.models import AvailableModelsResponse
from serve_app.api.graphql.queries import Password, Token
from serve_app.api.graphql.replies import start
from serve_app.api.graphql.resolvers import subscription
from serve_app.api.graphql.types import GraphInfo
from serve_app.domain.errors import Forbidden, InvalidInput, RotundaError
from serve_app.domain.events import Numbered
from serve_app.domain.fleet import FleetView

logger = logging.getLogger(__name__)

FLEET_POLL_S = 1.0

EventNumber = Annotated[int, strawberry.argument(description="The seq of the last event that was received.")]


@strawberry.type
class Subscription:
    @subscription("Stores a message and follows its reply to the end.")
    async def stream_message(self, info: GraphInfo, input: MessageInput) -> AsyncGenerator[StreamEvent, None]:
        if not info.context.may_write:
            raise Forbidden("A message is sent by POST or over a WebSocket, not by GET.")
        session = await start(info.context, input)
        async with aclosing(info.context.services.sessions.follow(session)) as events:
            async for numbered in events:
                yield event_of(numbered)

    @subscription(
        "Follows a reply, whichever server writes it. A RewindEvent says that text was lost and comes again; some time "
        "after its end a reply is told from its record, its whole text as one TokenEvent."
    )
    async def stream_session(
        self,
        info: GraphInfo,
        id: strawberry.ID,
        after: EventNumber = 0,
        password: Password = None,
        token: Token = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        async with aclosing(_follow(info.context, id, after, password, token)) as events:
            async for numbered in events:
                yield event_of(numbered)

    @subscription("The fleet now, and again whenever a model or provider has changed.")
    async def fleet_changed(self, info: GraphInfo) -> AsyncGenerator[AvailableModelsResponse, None]:
        router, shown = info.context.services.gateway.router, None
        view = await router.view()
        while True:
            if shown != (shown := _outline(view)):
                yield AvailableModelsResponse.of(view)
            await asyncio.sleep(FLEET_POLL_S)
            try:
                view = await router.view()
            except RotundaError as error:
                # A router that is replaced answers again after some seconds; until then the last view stands.
                logger.warning("the router gave no view: %s", error)


async def _follow(
    context: Context, id: str, after: int, password: str | None, token: str | None
) -> AsyncGenerator[Numbered, None]:
    if after < 0:
        raise InvalidInput("after must be the number of an event of this stream.")
    trace = context.trace
    with trace.phase("store.read"):
        session, _ = await context.session(id, password, token)
    trace.follows(session.trace_id, session.id)
    with trace.phase("stream.follow"):
        async with aclosing(context.services.sessions.follow(session, after)) as events:
            async for numbered in events:
                yield numbered


def _outline(view: FleetView) -> Any:
    """What of the fleet counts as a change: not the memory in use, which never stands still."""
    models = [
        (status.name, status.state, status.pinned, status.reason, len(status.reports), status.total("requests"))
        for status in view.models
    ]
    return models, view.providers
