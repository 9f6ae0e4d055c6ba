"""What can be asked."""

from __future__ import annotations

from typing import Annotated

import strawberry

from serve_app.api.graphql.errors import Failure, outcome
from serve_app.api.graphql.models import AvailableModelsResponse, Model, Plan
from serve_app.api.graphql.paging import MAX_PAGE, After, Before, Last, Limit, MessagePage, NextCursor, page_size
from serve_app.api.graphql.resolvers import field
from serve_app.api.graphql.rotation import RotationState
from serve_app.api.graphql.types import (
    Conversation,
    ConversationList,
    GraphInfo,
    Message,
    StreamSession,
    StreamSessionList,
)
from serve_app.api.models import find_model
from serve_app.domain.conversation import SessionStatus
from serve_app.store.records import Cursor

MOST_CONVERSATIONS = 10_000
"""Of a list without a limit; the cursor leads on from there."""

Password = Annotated[str | None, strawberry.argument(description="Proof of access to a private conversation.")]
Token = Annotated[
    str | None,
    strawberry.argument(description="Another proof: the accessToken of verifyPassword. Or X-Conversation-Token."),
]
Name = Annotated[str, strawberry.argument(description="A model's name, `provider/name`, or an alias.")]


@strawberry.type
class Query:
    @field("The public conversations, newest activity first.")
    async def conversations(
        self,
        info: GraphInfo,
        limit: Limit = None,
        after: NextCursor = None,
    ) -> ConversationList:
        store = info.context.services.store
        most = page_size(limit) or MOST_CONVERSATIONS
        found = await store.list_conversations(limit=most + 1, before=Cursor.decode(after) if after else None)
        page = found[:most]
        return ConversationList(
            conversations=[Conversation.of(stored) for stored in page],
            count=await store.count_conversations(),
            next_cursor=Cursor.of(page[-1]).encode() if len(found) > most else None,
        )

    @field("One conversation, with its messages.")
    async def conversation(
        self, info: GraphInfo, id: str, password: Password = None, token: Token = None
    ) -> Conversation:
        return Conversation.of(await info.context.conversation(id, password, token))

    @field("The messages of a conversation, oldest first.")
    async def messages(
        self,
        info: GraphInfo,
        conversation_id: str,
        password: Password = None,
        token: Token = None,
        limit: Limit = None,
        after: After = None,
        before: Before = None,
        last: Last = None,
    ) -> list[Message]:
        conversation = await info.context.conversation(conversation_id, password, token)
        found = await info.context.messages(conversation.id, MessagePage(limit, last, after, before))
        return [Message.of(stored, conversation.is_private) for stored in found]

    @field("Every model of every provider, and how each is right now.")
    async def available_models(self, info: GraphInfo) -> AvailableModelsResponse:
        return AvailableModelsResponse.of(await info.context.services.gateway.router.view())

    @field("One model by its name.")
    async def model(self, info: GraphInfo, name: Name) -> Model:
        return Model.of(find_model(await info.context.services.gateway.router.view(), name))

    @field("Whether and how a model would come into memory; nothing happens.")
    async def plan(self, info: GraphInfo, model: Name) -> Annotated[Plan | Failure, strawberry.union("PlanResult")]:
        async def ask() -> Plan:
            return Plan.of(await info.context.services.gateway.router.command("plan", model))

        return await outcome(ask(), info.context.trace.trace_id)

    @field("What holds memory, who waits for some, and what was decided.")
    async def rotation(self, info: GraphInfo) -> RotationState:
        return RotationState.of(await info.context.services.gateway.router.rotation())

    @field("One reply, running or ended.")
    async def stream_session(
        self, info: GraphInfo, id: strawberry.ID, password: Password = None, token: Token = None
    ) -> StreamSession:
        return StreamSession.of(*await info.context.session(id, password, token))

    @field("Replies, newest first: those of one conversation, else those of all public ones.")
    async def stream_sessions(
        self,
        info: GraphInfo,
        conversation_id: strawberry.ID | None = None,
        status: SessionStatus | None = None,
        password: Password = None,
        token: Token = None,
        limit: Limit = None,
        after: NextCursor = None,
    ) -> StreamSessionList:
        context, most = info.context, page_size(limit) or MAX_PAGE
        if conversation_id is not None:
            await context.conversation(conversation_id, password, token)
        found = await context.services.store.list_sessions(
            conversation_id,
            status,
            most + 1,
            before=Cursor.decode(after) if after else None,
            public_only=conversation_id is None,
        )
        page = found[:most]
        return StreamSessionList(
            sessions=[StreamSession.of(stored, context.services.sessions.find(stored.id)) for stored in page],
            next_cursor=Cursor.of(page[-1]).encode() if len(found) > most else None,
        )
