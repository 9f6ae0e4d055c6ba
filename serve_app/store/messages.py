"""Messages of a conversation, in the order in which they were stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, Select, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import MessageStatus, Sender, StoredMessage
from serve_app.domain.errors import InvalidInput, NotFound
from serve_app.store.conversations import touch
from serve_app.store.engine import Database, whole
from serve_app.store.files import chunks, images_of, insert_images, orphans
from serve_app.store.records import NewImage, message_of, message_values, new_id, utc_now
from serve_app.store.tables import clean, conversations, images, messages, stream_sessions

_LAST_SEQ = 2**62
_SEQ = select(func.coalesce(func.max(messages.c.seq), 0)).where(messages.c.conversation_id == bindparam("conversation"))
_INSERT = insert(messages).values(seq=_SEQ.scalar_subquery() + 1)
_BY_ID = select(messages).where(messages.c.id == bindparam("message"))
_OF_CONVERSATION = select(messages).where(messages.c.conversation_id == bindparam("conversation"))
_NEWEST = _OF_CONVERSATION.order_by(messages.c.seq.desc()).limit(bindparam("most"))


def new_message(
    conversation_id: str,
    text: str,
    sender: Sender,
    id: str | None = None,
    model: str | None = None,
    provider: str | None = None,
    status: MessageStatus = MessageStatus.COMPLETE,
) -> StoredMessage:
    """A message of this moment, as it will be kept."""
    return StoredMessage(
        id=clean(id or new_id()),
        conversation_id=clean(conversation_id),
        text=clean(text),
        sender=sender,
        timestamp=utc_now(),
        status=status,
        model=clean(model),
        provider=clean(provider),
    )


async def insert_message(
    connection: AsyncConnection, new: StoredMessage, images: Sequence[NewImage] = ()
) -> StoredMessage:
    """Add a message at the end of a conversation that this transaction has touched; InvalidInput for a taken id."""
    row = message_values(new, bool(images)) | {"conversation": new.conversation_id}
    try:
        await connection.execute(_INSERT, row)
    except IntegrityError as error:
        raise InvalidInput("A message with this id already exists.") from error
    kept = await insert_images(connection, new.conversation_id, new.id, images, new.timestamp)
    return replace(new, images=kept) if kept else new


class Messages:
    """The part of the store that keeps messages."""

    _db: Database

    @whole
    async def add_message(
        self,
        conversation_id: str,
        text: str,
        sender: Sender,
        *,
        id: str | None = None,
        model: str | None = None,
        provider: str | None = None,
        status: MessageStatus = MessageStatus.COMPLETE,
        images: Sequence[NewImage] = (),
    ) -> StoredMessage:
        """Add a message at the end of the conversation, which becomes the newest in activity.

        Raises NotFound for an unknown conversation and InvalidInput for an id that is taken.
        """
        async with self._db.write() as connection:
            await touch(connection, conversation_id, utc_now())
            new = new_message(conversation_id, text, sender, id, model, provider, status)
            return await insert_message(connection, new, images)

    @whole
    async def get_message(self, id: str) -> StoredMessage:
        """The message with its images; NotFound."""
        async with self._db.read() as connection:
            rows = list(await connection.execute(_BY_ID, {"message": id}))
            if not rows:
                raise _unknown_message()
            return (await _with_images(connection, rows))[0]

    @whole
    async def list_messages(
        self,
        conversation_id: str,
        *,
        limit: int | None = None,
        after: str | None = None,
        before: str | None = None,
    ) -> list[StoredMessage]:
        """Messages with their images, oldest first: all of them, or those after or before the message so named.

        ``limit`` keeps the first ones, or with ``before`` the last ones (a page upwards). NotFound for a message
        that is not in the conversation; an unknown conversation has no messages.
        """
        query = select(messages).where(messages.c.conversation_id == conversation_id)
        async with self._db.read() as connection:
            if after is not None:
                query = query.where(messages.c.seq > await _seq(connection, conversation_id, after))
            if before is not None:
                query = query.where(messages.c.seq < await _seq(connection, conversation_id, before))
            upwards = before is not None and after is None
            query = query.order_by(messages.c.seq.desc() if upwards else messages.c.seq).limit(limit)
            rows = list(await connection.execute(query))
            return await _with_images(connection, reversed(rows) if upwards else rows)

    @whole
    async def messages_of(
        self, conversation_ids: Collection[str], limit: int | None = None, *, newest: bool = False
    ) -> dict[str, list[StoredMessage]]:
        """The messages of many conversations at once, each list oldest first.

        ``limit`` keeps the first ones of each conversation, or the last ones with ``newest``; what it leaves out is not
        read, so a page of a long conversation costs what one of a short conversation does.
        """
        found: dict[str, list[StoredMessage]] = {id: [] for id in conversation_ids}
        async with self._db.read() as connection:
            for some in chunks(found):
                query = select(messages).where(messages.c.conversation_id.in_(some))
                if limit is not None:
                    query = _pages(some, limit, newest)
                rows = await connection.execute(query.order_by(messages.c.conversation_id, messages.c.seq))
                for message in await _with_images(connection, rows):
                    found[message.conversation_id].append(message)
        return found

    @whole
    async def last_messages(self, conversation_id: str, limit: int) -> list[StoredMessage]:
        """The last ``limit`` messages with their images, oldest first: what a model is given as its context."""
        async with self._db.read() as connection:
            rows = list(await connection.execute(_NEWEST, {"conversation": conversation_id, "most": limit}))
            return await _with_images(connection, reversed(rows))

    @whole
    async def delete_messages_after(self, conversation_id: str, message_id: str) -> tuple[int, list[str]]:
        """Delete what follows a message, which stays itself; NotFound for one that is not in the conversation.

        Returns how many messages went and the paths of the image files that nothing refers to any more.
        """
        async with self._db.write() as connection:
            await touch(connection, conversation_id, utc_now())
            seq = await _seq(connection, conversation_id, message_id)
            later = (messages.c.conversation_id == conversation_id) & (messages.c.seq > seq)
            ids = select(messages.c.id).where(later)
            paths = set(await connection.scalars(select(images.c.file_path).where(images.c.message_id.in_(ids))))
            await connection.execute(delete(images).where(images.c.message_id.in_(ids)))
            await connection.execute(
                update(stream_sessions).where(stream_sessions.c.message_id.in_(ids)).values(message_id=None)
            )
            deleted = (await connection.execute(delete(messages).where(later))).rowcount
            return deleted, await orphans(connection, paths)


def _pages(conversation_ids: Collection[str], limit: int, newest: bool) -> Select[Any]:
    """The first or last messages of each conversation, up to the place of the last one that the limit keeps."""
    other = messages.alias()
    order = other.c.seq.desc() if newest else other.c.seq
    nth = select(other.c.seq).where(other.c.conversation_id == conversations.c.id).order_by(order)
    end = nth.limit(1).offset(limit - 1).correlate(conversations).scalar_subquery()
    # A conversation with fewer has no such place.
    within = messages.c.seq >= func.coalesce(end, 0) if newest else messages.c.seq <= func.coalesce(end, _LAST_SEQ)
    both = conversations.join(messages, (messages.c.conversation_id == conversations.c.id) & within)
    return select(messages).select_from(both).where(conversations.c.id.in_(conversation_ids))


async def _seq(connection: AsyncConnection, conversation_id: str, message_id: str) -> int:
    query = select(messages.c.seq).where(messages.c.id == message_id, messages.c.conversation_id == conversation_id)
    seq = await connection.scalar(query)
    if seq is None:
        raise _unknown_message()
    return int(seq)


async def _with_images(connection: AsyncConnection, rows: Iterable[Row[Any]]) -> list[StoredMessage]:
    """The messages of ``rows`` with their images: one query for all that have some, none when none has."""
    kept = list(rows)
    found = await images_of(connection, [row.id for row in kept if row.has_images])
    return [message_of(row, found.get(row.id, ())) for row in kept]


def _unknown_message() -> NotFound:
    return NotFound("This message does not exist in the conversation. It may have been deleted.")
