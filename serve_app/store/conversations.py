"""Conversations: created, listed by activity, protected by a password, deleted with everything they hold."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import Conversation
from serve_app.domain.errors import InvalidInput, NotFound
from serve_app.store.engine import Database, whole
from serve_app.store.files import orphans
from serve_app.store.records import Cursor, NewConversation, conversation_of, utc_now
from serve_app.store.tables import conversations, images, messages, password_attempts, stream_sessions

_COUNT = select(func.count()).where(messages.c.conversation_id == conversations.c.id).scalar_subquery()


# Statements of every reply are made once, and their values given when they run: making them costs more than running.
_CREATE = insert(conversations)
_TOUCH = update(conversations).values(updated_at=bindparam("now"))
_TOUCH_ID = _TOUCH.where(conversations.c.id == bindparam("conversation"))
_OF_SESSION = select(stream_sessions.c.conversation_id).where(stream_sessions.c.id == bindparam("session"))
_TOUCH_OF_SESSION = _TOUCH.where(conversations.c.id == _OF_SESSION.scalar_subquery())


async def touch(connection: AsyncConnection, conversation_id: str, now: datetime) -> None:
    """Mark activity at ``now``; NotFound when the conversation does not exist.

    Every writer below a conversation comes here first: on PostgreSQL the row's lock puts them in line, and taking it
    first everywhere keeps them from waiting for each other in a circle.
    """
    changed = await connection.execute(_TOUCH_ID, {"conversation": conversation_id, "now": now})
    if not changed.rowcount:
        raise unknown_conversation()


async def touch_of(connection: AsyncConnection, session_id: str, now: datetime) -> bool:
    """:func:`touch` the conversation of a session; False when there is none."""
    changed = await connection.execute(_TOUCH_OF_SESSION, {"session": session_id, "now": now})
    return bool(changed.rowcount)


async def insert_conversation(connection: AsyncConnection, new: NewConversation) -> Conversation:
    """Keep a new conversation; InvalidInput when the id is taken."""
    try:
        await connection.execute(_CREATE, new.values())
    except IntegrityError as error:
        raise InvalidInput("A conversation with this id already exists.") from error
    return new.empty()


def behind(cursor: Cursor, at: Column[Any], id: Column[Any]) -> tuple[ColumnElement[bool], ...]:
    """What stands behind a place in a list by ``at`` and ``id``, newest first; the first condition is for the index."""
    return at <= cursor.at, or_(at < cursor.at, id < cursor.id)


def unknown_conversation() -> NotFound:
    return NotFound("This conversation does not exist. It may have been deleted.")


class Conversations:
    """The part of the store that keeps conversations."""

    _db: Database

    @whole
    async def create_conversation(
        self,
        id: str,
        tab_name: str,
        llm_model: str | None = None,
        password_hash: str | None = None,
        system_prompt: str | None = None,
    ) -> Conversation:
        """Keep a new conversation; a password hash makes it private. InvalidInput when the id is taken."""
        new = NewConversation(id, tab_name, llm_model, password_hash, system_prompt)
        async with self._db.write() as connection:
            return await insert_conversation(connection, new)

    @whole
    async def get_conversation(self, id: str) -> Conversation:
        """The conversation with its message count; NotFound."""
        async with self._db.read() as connection:
            return await _get(connection, id)

    @whole
    async def list_conversations(
        self, limit: int = 100, before: Cursor | None = None, include_private: bool = False
    ) -> list[Conversation]:
        """Conversations by activity, newest first; ``before`` continues after the conversation it was made of."""
        query = _visible(select(conversations, _COUNT.label("message_count")), include_private)
        if before is not None:
            query = query.where(*behind(before, conversations.c.updated_at, conversations.c.id))
        query = query.order_by(conversations.c.updated_at.desc(), conversations.c.id.desc()).limit(limit)
        async with self._db.read() as connection:
            return [conversation_of(row) for row in await connection.execute(query)]

    @whole
    async def count_conversations(self, include_private: bool = False) -> int:
        """How many conversations :meth:`list_conversations` would list without a limit."""
        query = _visible(select(func.count()).select_from(conversations), include_private)
        async with self._db.read() as connection:
            return int(await connection.scalar(query) or 0)

    @whole
    async def message_counts(self, ids: Collection[str]) -> dict[str, int]:
        """The number of messages of each conversation, 0 for one that has none or does not exist."""
        column = messages.c.conversation_id
        query = select(column, func.count().label("number")).where(column.in_(ids)).group_by(column)
        async with self._db.read() as connection:
            found = {row.conversation_id: row.number for row in await connection.execute(query)}
        return {id: found.get(id, 0) for id in ids}

    @whole
    async def set_password_hash(self, id: str, hash: str | None) -> None:
        """Make the conversation private, or public with None; NotFound. This is no activity."""
        await self._change(id, {"password_hash": hash, "is_private": hash is not None})

    @whole
    async def update_conversation(
        self,
        id: str,
        *,
        tab_name: str | None = None,
        llm_model: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        """Change what is not None; NotFound. This is no activity."""
        given = {"tab_name": tab_name, "llm_model": llm_model, "system_prompt": system_prompt}
        await self._change(id, {name: value for name, value in given.items() if value is not None})

    @whole
    async def delete_conversation(self, id: str) -> list[str]:
        """Delete the conversation with its messages, images and sessions; NotFound.

        Returns the paths of the image files that nothing refers to any more, for the caller to delete.
        """
        async with self._db.write() as connection:
            await touch(connection, id, utc_now())
            belongs = images.c.conversation_id == id
            paths = set(await connection.scalars(select(images.c.file_path).where(belongs).distinct()))
            # Children first and by name: a database that was taken over may lack the cascades.
            for table in (images, messages, stream_sessions, password_attempts):
                await connection.execute(delete(table).where(table.c.conversation_id == id))
            await connection.execute(delete(conversations).where(conversations.c.id == id))
            return await orphans(connection, paths)

    async def _change(self, id: str, values: dict[str, Any]) -> None:
        # An update of nothing would be no SQL; naming the key keeps the check that the row exists.
        statement = update(conversations).where(conversations.c.id == id).values({"id": id} | values)
        async with self._db.write() as connection:
            if not (await connection.execute(statement)).rowcount:
                raise unknown_conversation()


async def _get(connection: AsyncConnection, id: str) -> Conversation:
    query = select(conversations, _COUNT.label("message_count")).where(conversations.c.id == id)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise unknown_conversation()
    return conversation_of(row)


def _visible(query: Select[Any], include_private: bool) -> Select[Any]:
    return query if include_private else query.where(conversations.c.is_private.is_(False))
