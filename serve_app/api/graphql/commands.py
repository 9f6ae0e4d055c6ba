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
from serve_app.api.graphql.rotation import Cleanup, RotationChange
from serve_app.api.graphql.types import GraphInfo, StreamSession

ModelResult = Annotated[ModelChange | Failure, strawberry.union("ModelResult")]
RotationResult = Annotated[RotationChange | Failure, strawberry.union("RotationResult")]
CleanupResult = Annotated[Cleanup | Failure, strawberry.union("CleanupResult")]
SendMessageResult = Annotated[StreamSession | Failure, strawberry.union("SendMessageResult")]
Names = Annotated[list[str] | None, strawberry.argument(description="Names of models, as in loadModel.")]


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

    @mutation("Takes models into the pool of those that may be used, or out of it; the others stay as they are.")
    async def set_rotation(self, info: GraphInfo, add: Names = None, remove: Names = None) -> RotationResult:
        async def change() -> RotationChange:
            router = info.context.services.gateway.router
            answer = await router.command("set_rotation", add=list(add or ()), remove=list(remove or ()))
            return RotationChange(removed=list(answer["removed"]))

        return await outcome(change(), info.context.trace.trace_id)

    @mutation("Lets every idle model that is not pinned leave memory now.")
    async def emergency_cleanup(self, info: GraphInfo) -> CleanupResult:
        async def clean() -> Cleanup:
            answer = await info.context.services.gateway.router.command("emergency_cleanup")
            return Cleanup(evicting=list(answer["evicting"]))

        return await outcome(clean(), info.context.trace.trace_id)

    @mutation("Stores a message and starts its reply; follow it with streamSession.")
    async def send_message(self, info: GraphInfo, input: MessageInput) -> SendMessageResult:
        async def send() -> StreamSession:
            session = await start(info.context, input)
            return StreamSession.of(session, info.context.services.sessions.find(session.id))

        return await outcome(send(), info.context.trace.trace_id)


async def _command(info: GraphInfo, action: str, model: str, **arguments: Any) -> ModelChange | Failure:
    async def run() -> ModelChange:
        return ModelChange.of(await info.context.services.gateway.router.command(action, model, **arguments))

    return await outcome(run(), info.context.trace.trace_id)
