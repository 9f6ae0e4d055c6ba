"""What the resolvers of one operation share: the services, the caller's proofs, the trace, the batched loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket
from strawberry.dataloader import DataLoader
from strawberry.fastapi import BaseContext

from serve_app.api.access import ANONYMOUS
from serve_app.api.context import TOKEN_HEADER, address_of, caller_of, token_of, trace_of
from serve_app.api.graphql.paging import MessagePage
from serve_app.api.services import Services
from serve_app.domain.conversation import Conversation, SessionStatus, StoredImage, StoredMessage, StreamSession
from serve_app.replies import LiveReply
from serve_app.telemetry.logs import about


class Page(NamedTuple):
    """The first messages of a conversation, or its last ones: all of them without a limit."""

    conversation_id: str
    limit: int | None = None
    newest: bool = False


class Context(BaseContext):
    """One HTTP request or one WebSocket; :meth:`for_operation` makes the context of each operation on it."""

    def __init__(self, services: Services, connection: HTTPConnection) -> None:
        super().__init__()
        self.services = services
        self.access = services.access
        self.connection = connection
        self.caller = caller_of(connection)
        self.trace = trace_of(connection.scope)
        self._messages = DataLoader(self._load_messages, cache=False)

    def __repr__(self) -> str:
        return f"Context(trace={self.trace.trace_id!r}, caller={self.caller!r})"

    @property
    def is_websocket(self) -> bool:
        return isinstance(self.connection, WebSocket)

    @property
    def may_write(self) -> bool:
        """A page of another site can make a browser send a GET with the network's rights, but no more than that."""
        return self.is_websocket or self.connection.scope["method"] != "GET"

    def for_operation(self) -> Context:
        """The context of one operation: on a WebSocket each has a trace of its own."""
        context = copy.copy(self)
        if self.is_websocket:
            context.trace = self.services.tracing.serve("WS /graphql", None, trust=False)
            about(trace_id=context.trace.trace_id)
        context._messages = DataLoader(context._load_messages, cache=False)
        return context

    def admit(self) -> None:
        """Take the API key of a WebSocket from its ``connection_init``. Raises Unauthenticated without a valid one."""
        if self.caller is None:
            self.caller = self.access.caller(self._parameter("authorization"))

    async def conversation(self, id: str, password: str | None = None, token: str | None = None) -> Conversation:
        """The conversation, if the proof opens it: the arguments', else the connection's. Raises as Access does."""
        token = token or token_of(self.connection) or self._parameter(TOKEN_HEADER, "conversationtoken")
        return await self.access.conversation(id, password=password, token=token, address=address_of(self.connection))

    async def session(
        self, id: str, password: str | None = None, token: str | None = None
    ) -> tuple[StreamSession, LiveReply | None]:
        """A session of a conversation that the proof opens, and its live reply when this ingress generates it."""
        session = await self.services.store.get_session(id)
        await self.conversation(session.conversation_id, password, token)
        live = self.services.sessions.find(id)
        if live is None and session.status is SessionStatus.ACTIVE:
            # It may have ended between the two looks.
            session = await self.services.store.get_session(id)
        return session, live

    @property
    def caller_name(self) -> str:
        return self.caller or ANONYMOUS

    def image_url(self, image: StoredImage, private: bool) -> str:
        return self.access.image_url(image, private)

    async def messages(self, conversation_id: str, wanted: MessagePage) -> list[StoredMessage]:
        """Messages of a conversation; what one operation asks for at the same time is loaded at once."""
        limit = wanted.checked_limit()
        if wanted.after is None and wanted.before is None:
            return await self._messages.load(Page(conversation_id, limit, wanted.last is not None))
        store = self.services.store
        return await store.list_messages(conversation_id, limit=limit, after=wanted.after, before=wanted.before)

    def _parameter(self, *names: str) -> str | None:
        """A parameter of ``connection_init``; names are compared as those of headers are."""
        given = self.connection_params
        if isinstance(given, Mapping):
            for name, value in given.items():
                if str(name).lower() in names and isinstance(value, str):
                    return value
        return None

    async def _load_messages(self, pages: list[Page]) -> list[list[StoredMessage]]:
        found: dict[Page, list[StoredMessage]] = {}
        for limit, newest in {(page.limit, page.newest) for page in pages}:
            ids = {page.conversation_id for page in pages if (page.limit, page.newest) == (limit, newest)}
            for id, messages in (await self.services.store.messages_of(ids, limit, newest=newest)).items():
                found[Page(id, limit, newest)] = messages
        return [found[page] for page in pages]
