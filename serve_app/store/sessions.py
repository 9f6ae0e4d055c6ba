"""Stream sessions: one active reply per conversation, owned by one ingress, ended exactly once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Column, Row, bindparam, func, insert, literal_column, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import MessageStatus, SessionStatus, StreamSession, TerminationReason
from serve_app.domain.errors import ConversationBusy, InvalidInput, NotFound, ProviderUnavailable
from serve_app.domain.generation import Timing, Usage
from serve_app.store.conversations import behind, touch
from serve_app.store.engine import Database, whole
from serve_app.store.files import chunks
from serve_app.store.messages import insert_message
from serve_app.store.records import (
    BegunReply,
    Cursor,
    NewImage,
    NewSession,
    Progress,
    new_id,
    session_of,
    timing_columns,
    usage_columns,
    utc_now,
)
from serve_app.store.tables import ACTIVE, conversations, database_ms, stream_sessions

_session = stream_sessions.c
# Spelled out rather than bound: the partial indexes are for exactly this condition, and planners must see it.
_IS_ACTIVE = _session.status == literal_column(f"'{ACTIVE}'")
# A session of the chat service never had an owner.
_IS_EXPIRED = func.coalesce(_session.owned_until_ms, 0) < database_ms()

_SAVED_AS = {
    SessionStatus.COMPLETED: MessageStatus.COMPLETE,
    SessionStatus.TERMINATED: MessageStatus.TERMINATED,
    SessionStatus.ERROR: MessageStatus.ERROR,
}


def _unless_given(column: Column[Any]) -> Any:
    return func.coalesce(bindparam(f"new_{column.name}", type_=column.type), column)


# One statement for the progress of many sessions: the drivers then cross to the database once.
_PROGRESS = (
    update(stream_sessions)
    .where(_session.id == bindparam("new_session_id"), _IS_ACTIVE)
    .values(
        updated_at=bindparam("at"),
        partial_response=_unless_given(_session.partial_response),
        token_count=_unless_given(_session.token_count),
        model=_unless_given(_session.model),
        provider=_unless_given(_session.provider),
    )
)


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
    ) -> BegunReply:
        """Store the user's message and open the session that answers it: both or neither.

        Raises NotFound for an unknown conversation, ConversationBusy while another reply runs
        (``details["sessionId"]`` names it), and InvalidInput for an id that is taken.
        """
        async with self._db.write() as connection:
            await _claim(connection, new.conversation_id)
            message = await insert_message(connection, new.conversation_id, text, "user", id=message_id, images=images)
            return BegunReply(message, await _insert(connection, new))

    @whole
    async def open_session(self, new: NewSession) -> StreamSession:
        """Open a session without a new message, to answer what is there. Raises as :meth:`begin_reply` does."""
        async with self._db.write() as connection:
            await _claim(connection, new.conversation_id)
            return await _insert(connection, new)

    @whole
    async def get_session(self, id: str) -> StreamSession:
        """The session; NotFound."""
        async with self._db.read() as connection:
            return session_of(await _row(connection, id))

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
            query = query.where(_session.conversation_id == conversation_id)
        if status is not None:
            query = query.where(_session.status == status.value)
        if before is not None:
            query = query.where(*behind(before, _session.started_at, _session.id))
        if public_only:
            of_it = (conversations.c.id == _session.conversation_id) & conversations.c.is_private.is_(False)
            query = query.where(select(conversations.c.id).where(of_it).exists())
        query = query.order_by(_session.started_at.desc(), _session.id.desc()).limit(limit)
        async with self._db.read() as connection:
            return [session_of(row) for row in await connection.execute(query)]

    @whole
    async def update_session(
        self,
        id: str,
        *,
        partial_response: str | None = None,
        token_count: int | None = None,
        model: str | None = None,
        provider: str | None = None,
    ) -> bool:
        """Record progress; False when the session has ended or does not exist, and then nothing changes."""
        return id in await self.save_progress([Progress(id, partial_response, token_count, model, provider)])

    @whole
    async def save_progress(self, progress: Sequence[Progress]) -> set[str]:
        """Record the progress of many sessions in one transaction; returns the ids of those still active."""
        if not progress:
            return set()
        now = utc_now()
        rows = [{"at": now} | {f"new_{name}": value for name, value in asdict(one).items()} for one in progress]
        async with self._db.write() as connection:
            await connection.execute(_PROGRESS, rows)
            alive: set[str] = set()
            for ids in chunks({one.session_id for one in progress}):
                alive |= set(await connection.scalars(select(_session.id).where(_session.id.in_(ids), _IS_ACTIVE)))
            return alive

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
    ) -> StreamSession:
        """End the session and, when ``text`` is not empty, save it as the reply in the same transaction.

        Only the first end counts: a later call changes nothing and returns the session as it ended. ``model`` and
        ``provider`` default to the session's, ``message_id`` to a new id. Raises NotFound, also when the
        conversation was deleted meanwhile, and InvalidInput for the status ACTIVE.
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
            **usage_columns(usage),
            **timing_columns(timing),
        }
        values |= {name: value for name, value in (("model", model), ("provider", provider)) if value is not None}
        async with self._db.write() as connection:
            row = await _row(connection, id)
            if row.status != ACTIVE:
                return session_of(row)
            await touch(connection, row.conversation_id, utc_now())
            return session_of(await _finish(connection, id, values, message_id))

    @whole
    async def request_termination(self, id: str, reason: TerminationReason | str) -> bool:
        """Ask the session's owner to stop it; the first reason stays. False when it has ended already; NotFound."""
        now = utc_now()
        values = {
            "terminate_requested_at": func.coalesce(_session.terminate_requested_at, now),
            "terminate_reason": func.coalesce(_session.terminate_reason, str(reason)),
        }
        async with self._db.write() as connection:
            change = update(stream_sessions).where(_session.id == id, _IS_ACTIVE).values(values)
            if (await connection.execute(change)).rowcount:
                return True
            await _row(connection, id)
            return False

    @whole
    async def termination_requests(self, owner: str) -> dict[str, str]:
        """The reasons for which active sessions of ``owner`` should stop, by session id."""
        query = select(_session.id, _session.terminate_reason).where(
            _session.owner == owner, _IS_ACTIVE, _session.terminate_requested_at.is_not(None)
        )
        async with self._db.read() as connection:
            return {row.id: row.terminate_reason for row in await connection.execute(query)}

    @whole
    async def renew_ownership(self, owner: str, ids: Collection[str], ttl_s: float = 5.0) -> set[str]:
        """Own the sessions for ``ttl_s`` more seconds by the database's clock.

        Returns the ids that ``owner`` still owns; whoever generates one of the others must stop without a word.
        """
        if not ids:
            return set()
        async with self._db.write() as connection:
            kept: set[str] = set()
            for some in chunks(ids):
                change = update(stream_sessions).where(_session.id.in_(some), _session.owner == owner, _IS_ACTIVE)
                change = change.values(owned_until_ms=_until(ttl_s))
                kept |= set(await connection.scalars(change.returning(_session.id)))
            return kept

    @whole
    async def abandoned_sessions(self) -> list[StreamSession]:
        """The active sessions whose ownership has run out by the database's clock, oldest first."""
        query = select(stream_sessions).where(_IS_ACTIVE, _IS_EXPIRED).order_by(_session.started_at)
        async with self._db.read() as connection:
            return [session_of(row) for row in await connection.execute(query)]

    @whole
    async def adopt_session(self, id: str, owner: str, ttl_s: float = 5.0) -> StreamSession | None:
        """Take over an abandoned session; None when somebody else did, or it is owned or has ended."""
        values = {"owner": owner, "owned_until_ms": _until(ttl_s)}
        change = update(stream_sessions).where(_session.id == id, _IS_ACTIVE, _IS_EXPIRED).values(values)
        async with self._db.write() as connection:
            row = (await connection.execute(change.returning(stream_sessions))).one_or_none()
            return None if row is None else session_of(row)

    @whole
    async def close_abandoned(self) -> list[StreamSession]:
        """End every abandoned session with its partial reply saved; returns those that this call ended.

        They end as ERROR, or as TERMINATED when that had been asked for.
        """
        closed: list[StreamSession] = []
        for session in await self.abandoned_sessions():
            async with self._db.write() as connection:
                try:
                    await touch(connection, session.conversation_id, utc_now())
                except NotFound:
                    continue
                row = await _close_if_abandoned(connection, _session.id == session.id)
                if row is not None:
                    closed.append(session_of(row))
        return closed


async def _claim(connection: AsyncConnection, conversation_id: str) -> None:
    """Make sure that no other reply runs in the conversation; one whose owner is gone ends here."""
    await touch(connection, conversation_id, utc_now())
    ours = _session.conversation_id == conversation_id
    await _close_if_abandoned(connection, ours)
    running = await connection.scalar(select(_session.id).where(ours, _IS_ACTIVE))
    if running is not None:
        raise ConversationBusy(
            "A reply is still being written in this conversation. Wait for its end, or terminate it.",
            details={"sessionId": running},
        )


async def _insert(connection: AsyncConnection, new: NewSession) -> StreamSession:
    now = utc_now()
    values = {
        "id": new.id,
        "conversation_id": new.conversation_id,
        "model": new.model,
        "provider": new.provider,
        "status": ACTIVE,
        "started_at": now,
        "updated_at": now,
        "created_at": now,
        "partial_response": "",
        "token_count": 0,
        "timeout_ms": new.timeout_ms,
        "trace_id": new.trace_id,
        "owner": new.owner,
        "owned_until_ms": _until(new.ttl_s),
    }
    try:
        row = await connection.execute(insert(stream_sessions).values(values).returning(stream_sessions))
    except IntegrityError as error:
        # Another active session is out of the question: the conversation was claimed in this transaction.
        raise InvalidInput("A stream session with this id already exists.") from error
    return session_of(row.one())


async def _finish(
    connection: AsyncConnection, id: str, values: dict[str, Any], message_id: str | None = None
) -> Row[Any]:
    """End an active session of a conversation that this transaction has touched; the first end wins."""
    now = utc_now()
    change = update(stream_sessions).where(_session.id == id, _IS_ACTIVE)
    change = change.values(values | {"updated_at": now, "ended_at": now, "owned_until_ms": None})
    row = (await connection.execute(change.returning(stream_sessions))).one_or_none()
    if row is None or not row.partial_response:
        return row or await _row(connection, id)
    message = await insert_message(
        connection,
        row.conversation_id,
        row.partial_response,
        "llm",
        id=message_id or new_id(),
        model=row.model,
        provider=row.provider,
        status=_SAVED_AS[SessionStatus(row.status)],
    )
    saved = update(stream_sessions).where(_session.id == id).values(message_id=message.id)
    updated: Row[Any] = (await connection.execute(saved.returning(stream_sessions))).one()
    return updated


async def _close_if_abandoned(connection: AsyncConnection, condition: Any) -> Row[Any] | None:
    """End the one session that ``condition`` names, if its ownership has run out."""
    query = select(_session.id, _session.terminate_reason).where(condition, _IS_ACTIVE, _IS_EXPIRED)
    found = (await connection.execute(query)).one_or_none()
    if found is None:
        return None
    if found.terminate_reason is not None:
        return await _finish(
            connection,
            found.id,
            {"status": SessionStatus.TERMINATED.value, "termination_reason": found.terminate_reason},
        )
    return await _finish(
        connection,
        found.id,
        {
            "status": SessionStatus.ERROR.value,
            "termination_reason": TerminationReason.ERROR.value,
            "error_code": ProviderUnavailable.code,
            "error_message": "The server that wrote this reply stopped before its end. Ask again for a new reply.",
        },
    )


async def _row(connection: AsyncConnection, id: str) -> Row[Any]:
    row = (await connection.execute(select(stream_sessions).where(_session.id == id))).one_or_none()
    if row is None:
        raise NotFound("This stream session does not exist. Its conversation may have been deleted.")
    return row


def _until(ttl_s: float) -> Any:
    return database_ms() + int(ttl_s * 1000)
