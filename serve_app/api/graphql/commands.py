"""The mutations that are new here: each gives its result, or a Failure as a value."""

from __future__ import annotations

from typing import Annotated, Any

import strawberry

from serve_app.api.graphql.errors import Failure, outcome
from serve_app.api.graphql.inputs import MessageInput
from serve_app.api.graphql.models import ModelChange
from serve_app.api.graphql.queries import Name
from serve_app.api.graphql.replies import start
from serve_app.api.graphql.resolvers import mutation
from serve_app.api.graphql.types import GraphInfo, StreamSession

ModelResult = Annotated[ModelChange | Failure, strawberry.union("ModelResult")]
SendMessageResult = Annotated[StreamSession | Failure, strawberry.union("SendMessageResult")]


@strawberry.type
class Commands:
    @mutation("Brings a model into memory.")
    async def load_model(self, info: GraphInfo, model: Name) -> ModelResult:
        return await _command(info, "load", model)

    @mutation("Lets a model leave memory once its replies have ended.")
    async def unload_model(self, info: GraphInfo, model: Name) -> ModelResult:
        return await _command(info, "unload", model)

    @mutation("Keeps a model in memory, or no longer does.")
    async def pin_model(self, info: GraphInfo, model: Name, pinned: bool = True) -> ModelResult:
        return await _command(info, "pin", model, pinned=pinned)

    @mutation("Brings a model into memory before somebody asks it.")
    async def warmup(self, info: GraphInfo, model: Name) -> ModelResult:
        return await _command(info, "load", model)

    @mutation("Stores a message and starts its reply; follow it with streamSession.")
    async def send_message(self, info: GraphInfo, input: MessageInput) -> SendMessageResult:
        async def send() -> StreamSession:
            reply = await start(info.context, input)
            return StreamSession.of(reply.session, reply)

        return await outcome(send(), info.context.trace.trace_id)


async def _command(info: GraphInfo, action: str, model: str, **arguments: Any) -> ModelChange | Failure:
    async def run() -> ModelChange:
        return ModelChange.of(await info.context.services.gateway.router.command(action, model, **arguments))

    return await outcome(run(), info.context.trace.trace_id)
