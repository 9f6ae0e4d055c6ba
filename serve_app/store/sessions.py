"""Stream sessions: one active reply per conversation, owned by one ingress, ended exactly once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import SessionStatus, StreamSession, TerminationReason
from serve_app.domain.errors import ConversationBusy, InvalidInput
from serve_app.domain.generation import Timing, Usage
from serve_app.domain.stream_log import LogRow
from serve_app.store import fused
from serve_app.store.conversations import behind, insert_conversation, touch_of
from serve_app.store.engine import Database, whole
from serve_app.store.messages import insert_message, new_message
from serve_app.store.records import (
    AlreadyBegun,
    BegunReply,
    Cursor,
    NewConversation,
    NewImage,
    NewSession,
    new_id,
    session_of,
    timing_columns,
    usage_columns,
    utc_now,
)
from serve_app.store.session_rows import IS_ACTIVE, claim, finish, insert_session, row_of, session, written
from serve_app.store.tables import conversations, stream_sessions


class Sessions:
    """The part of the store that keeps stream sessions."""

    _db: Database

    @whole
    async def begin_reply(
        self,
        new: NewSession,
        *,
        text: str,
        images: Sequence[NewImage] = (),
        message_id: str | None = None,
        conversation: NewConversation | None = None,
    ) -> BegunReply:
        """Store the user's message and open the session that answers it, in a new ``conversation`` if one is given: all
        or nothing.

        Raises NotFound for an unknown conversation, ConversationBusy while another reply runs
        (``details["sessionId"]`` names it), InvalidInput for an id that is taken, and AlreadyBegun when a session
        has the idempotency key.
        """
        if conversation is not None and not images and self._db.fuses:
            question = new_message(new.conversation_id, text, "user", message_id)
            async with self._db.alone() as connection:
                with suppress(IntegrityError):  # something is there already: the long way says what
                    await fused.begin(connection, new, question, conversation)
                    return BegunReply(question, new.begun(question.id))

        async def begun(connection: AsyncConnection) -> BegunReply:
            if conversation is None:
                await _claim(connection, new)
            else:
                await _refuse_known(connection, new)
                await insert_conversation(connection, conversation)
            message = await insert_message(
                connection, new_message(new.conversation_id, text, "user", message_id), images
            )
            return BegunReply(message, await insert_session(connection, new, message.id))

        async with self._one_per_key(new):
            return await self._db.write_at_once(begun)

    @whole
    async def open_session(self, new: NewSession) -> StreamSession:
        """Open a session without a new message, to answer what is there. Raises as :meth:`begin_reply` does."""
        async with self._one_per_key(new), self._db.write() as connection:
            await _claim(connection, new)
            return await insert_session(connection, new, None)

    @asynccontextmanager
    async def _one_per_key(self, new: NewSession) -> AsyncIterator[None]:
        """Two requests with one key may begin at the same moment, in two conversations: then the index decides."""
        try:
            yield
        except InvalidInput:
            if new.idempotency_key is not None and (known := await self.session_by_key(new.idempotency_key)):
                raise AlreadyBegun(known.id) from None
            raise

    @whole
    async def session_by_key(self, idempotency_key: str) -> StreamSession | None:
        """The session that was begun with this key."""
        query = select(stream_sessions).where(session.idempotency_key == idempotency_key)
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
            return None if row is None else session_of(row)

    @whole
    async def get_session(self, id: str, *, log: bool = True) -> StreamSession:
        """The session, one that runs with what the log has of its reply (unless not ``log``); NotFound."""
        async with self._db.read() as connection:
            found = session_of(await row_of(connection, id))
            return (await _up_to_date(connection, [found]))[0] if log else found

    @whole
    async def list_sessions(
        self,
        conversation_id: str | None = None,
        status: SessionStatus | None = None,
        limit: int = 100,
        *,
        before: Cursor | None = None,
        public_only: bool = False,
    ) -> list[StreamSession]:
        """Sessions, newest first, of one conversation and in one status if these are given.

        ``before`` continues after the session it was made of; ``public_only`` leaves out private conversations.
        """
        query = select(stream_sessions)
        if conversation_id is not None:
            query = query.where(session.conversation_id == conversation_id)
        if status is not None:
            query = query.where(session.status == status.value)
        if before is not None:
            query = query.where(*behind(before, session.started_at, session.id))
        if public_only:
            of_it = (conversations.c.id == session.conversation_id) & conversations.c.is_private.is_(False)
            query = query.where(select(conversations.c.id).where(of_it).exists())
        query = query.order_by(session.started_at.desc(), session.id.desc()).limit(limit)
        async with self._db.read() as connection:
            return await _up_to_date(connection, [session_of(row) for row in await connection.execute(query)])

    @whole
    async def finish_session(
        self,
        id: str,
        *,
        status: SessionStatus,
        text: str = "",
        token_count: int = 0,
        finish_reason: str | None = None,
        usage: Usage | None = None,
        timing: Timing | None = None,
        termination_reason: TerminationReason | str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
        model: str | None = None,
        provider: str | None = None,
        message_id: str | None = None,
        provider_stopped: bool | None = None,
        epoch: int | None = None,
        rows: Sequence[LogRow] = (),
    ) -> StreamSession:
        """End the session and, when ``text`` is not empty, save it as the reply in the same transaction.

        Only the first end counts: a later call changes nothing and returns the session as it ended. Nor does it for
        a session that has another ``epoch`` than the one given: then it has another owner. ``model`` and
        ``provider`` default to the session's, ``message_id`` to a new id; ``rows`` are the rest of the log. Raises
        NotFound, also when the conversation was deleted meanwhile, and InvalidInput for the status ACTIVE.
        """
        if status is SessionStatus.ACTIVE:
            raise InvalidInput("A session ends as COMPLETED, TERMINATED or ERROR.")
        values = {
            "status": status.value,
            "partial_response": text,
            "token_count": token_count,
            "finish_reason": finish_reason,
            "termination_reason": None if termination_reason is None else str(termination_reason),
            "error_code": error_code,
            "error_message": error_message,
            "provider_stopped": provider_stopped,
            **usage_columns(usage),
            **timing_columns(timing),
        }
        if self._db.fuses and epoch is not None and model and provider:
            saved = {"model": model, "provider": provider, "message_id": (message_id or new_id()) if text else None}
            async with self._db.alone() as connection:
                with suppress(IntegrityError):  # somebody has just added a message: the long way puts this behind it
                    if (row := await fused.finish(connection, id, values | saved, rows, epoch)) is not None:
                        return session_of(row)
        values |= {name: value for name, value in (("model", model), ("provider", provider)) if value is not None}

        async def ended(connection: AsyncConnection) -> StreamSession:
            if not await touch_of(connection, id, utc_now()):
                await row_of(connection, id)
            return session_of(await finish(connection, id, values, rows, message_id, epoch))

        return await self._db.write_at_once(ended)

    @whole
    async def request_termination(self, id: str, reason: TerminationReason | str) -> bool:
        """Ask the session's owner to stop it; the first reason stays. False when it has ended already; NotFound."""
        now = utc_now()
        values = {
            "terminate_requested_at": func.coalesce(session.terminate_requested_at, now),
            "terminate_reason": func.coalesce(session.terminate_reason, str(reason)),
        }
        async with self._db.write() as connection:
            change = update(stream_sessions).where(session.id == id, IS_ACTIVE).values(values)
            if (await connection.execute(change)).rowcount:
                return True
            await row_of(connection, id)
            return False


async def _claim(connection: AsyncConnection, new: NewSession) -> None:
    """Make sure that no other reply runs in the conversation, and that this one was not begun before."""
    running = await claim(connection, new.conversation_id)
    await _refuse_known(connection, new)
    if running is not None:
        raise ConversationBusy(
            "A reply is still being written in this conversation. Wait for its end, or terminate it.",
            details={"sessionId": running},
        )


async def _refuse_known(connection: AsyncConnection, new: NewSession) -> None:
    """Raise AlreadyBegun when a session has the idempotency key."""
    if new.idempotency_key is not None:
        known = await connection.scalar(select(session.id).where(session.idempotency_key == new.idempotency_key))
        if known is not None:
            raise AlreadyBegun(known)


async def _up_to_date(connection: AsyncConnection, found: list[StreamSession]) -> list[StreamSession]:
    """Sessions that run with their text so far: it stands in the log, their rows get it in the end."""
    log = await written(connection, [one.id for one in found if one.status is SessionStatus.ACTIVE])
    return [
        replace(one, partial_response=log[one.id].text, token_count=log[one.id].token_count)
        if one.id in log and log[one.id].seq
        else one
        for one in found
    ]
