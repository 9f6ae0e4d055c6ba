"""Rows of stream_sessions and of their log, inside a transaction: what the parts of the store have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BigInteger, Row, bindparam, func, insert, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import MessageStatus, SessionStatus, StreamSession, TerminationReason
from serve_app.domain.errors import InvalidInput, NotFound, ProviderUnavailable
from serve_app.domain.events import Event, Failed, Numbered, Terminated
from serve_app.domain.stream_log import TOKEN, Entry, LogRow, Origin, rows_of
from serve_app.store.conversations import touch
from serve_app.store.files import chunks
from serve_app.store.messages import insert_message, new_message
from serve_app.store.records import NewSession, log_values, new_id, session_of, utc_now
from serve_app.store.tables import ACTIVE, database_ms, stream_events, stream_sessions

session = stream_sessions.c
events = stream_events.c
# Spelled out rather than bound: the partial indexes are for exactly this condition, and planners must see it.
IS_ACTIVE = session.status == literal_column(f"'{ACTIVE}'")
# A session of the chat service never had an owner.
IS_EXPIRED = func.coalesce(session.owned_until_ms, 0) < database_ms()

PULSE = (session.id, session.epoch, session.terminate_reason)

_SAVED_AS = {
    SessionStatus.COMPLETED: MessageStatus.COMPLETE,
    SessionStatus.TERMINATED: MessageStatus.TERMINATED,
    SessionStatus.ERROR: MessageStatus.ERROR,
}
# A batch whose commit was not confirmed is written again, row for row.
_APPEND = {
    "sqlite": sqlite.insert(stream_events).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(stream_events).on_conflict_do_nothing(),
}
# Statements of every reply are made once, and their values given when they run: making them costs more than running.
OWNED = database_ms() + bindparam("ttl_ms", type_=BigInteger)
_INSERT = insert(stream_sessions).values(owned_until_ms=OWNED)
_BY_ID = select(stream_sessions).where(session.id == bindparam("session"))
_BY_ID_LOCKED = _BY_ID.with_for_update()
_FINISH = (
    update(stream_sessions)
    .where(session.id == bindparam("session"), IS_ACTIVE)
    .values(owned_until_ms=None)
    .returning(stream_sessions)
)
_FINISH_OWN = _FINISH.where(session.epoch == bindparam("owners_epoch"))
_RUNNING = (
    select(stream_sessions, IS_EXPIRED.label("expired"))
    .where(session.conversation_id == bindparam("conversation"), IS_ACTIVE)
    .with_for_update()
)
_GONE = "The server that wrote this reply stopped before its end. Ask again for a new reply."


@dataclass
class Written:
    """What the log holds of a reply; ``seq`` is the number of its last event."""

    seq: int = 0
    parts: list[str] = field(default_factory=list)
    token_count: int = 0
    model: str | None = None
    provider: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


def saved_as(status: str) -> MessageStatus:
    """The status of the message that a session leaves which ended so."""
    return _SAVED_AS[SessionStatus(status)]


def until(ttl_s: float) -> Any:
    """The moment ``ttl_s`` seconds from now, by the database's clock."""
    return database_ms() + int(ttl_s * 1000)


async def row_of(connection: AsyncConnection, id: str, lock: bool = False) -> Row[Any]:
    """The session's row, which nobody else changes meanwhile if ``lock``; NotFound."""
    row = (await connection.execute(_BY_ID_LOCKED if lock else _BY_ID, {"session": id})).one_or_none()
    if row is None:
        raise NotFound("This stream session does not exist. Its conversation may have been deleted.")
    return row


async def insert_session(connection: AsyncConnection, new: NewSession, question_id: str | None) -> StreamSession:
    """Open a session in a conversation that this transaction has claimed."""
    try:
        await connection.execute(_INSERT, new.values(question_id) | new.lease())
    except IntegrityError as error:
        # Another active session is out of the question: the conversation was claimed in this transaction.
        raise InvalidInput("A stream session with this id already exists.") from error
    return new.begun(question_id)


async def append(connection: AsyncConnection, session_id: str, rows: Sequence[LogRow]) -> None:
    """Write rows of the log of a session that this transaction has locked."""
    if rows:
        await connection.execute(_APPEND[connection.dialect.name], [log_values(session_id, row) for row in rows])


async def append_many(connection: AsyncConnection, batches: Sequence[tuple[str, Sequence[LogRow]]]) -> None:
    """:func:`append` for many sessions: the drivers cross to the database once."""
    values = [log_values(session_id, row) for session_id, rows in batches for row in rows]
    if values:
        await connection.execute(_APPEND[connection.dialect.name], values)


async def written(connection: AsyncConnection, ids: Collection[str]) -> dict[str, Written]:
    """What the log holds of each reply; nothing of one without a log."""
    found = {id: Written() for id in ids}
    columns = (events.session_id, events.seq, events.seq_to, events.kind, events.text, events.token_ids)
    for some in chunks(found):
        query = select(*columns, events.model, events.provider).where(events.session_id.in_(some))
        for row in await connection.execute(query.order_by(events.session_id, events.seq)):
            one = found[row.session_id]
            one.seq = row.seq_to
            if row.kind == TOKEN:
                one.parts.append(row.text)
                untold = row.seq_to - row.seq + 1  # of a server that tells no ids, an event is a token
                one.token_count += row.token_ids.count(",") + 1 if row.token_ids else untold
                one.model, one.provider = row.model, row.provider
    return found


async def finish(
    connection: AsyncConnection,
    id: str,
    values: dict[str, Any],
    rows: Sequence[LogRow] = (),
    message_id: str | None = None,
    epoch: int | None = None,
) -> Row[Any]:
    """End an active session of a conversation that this transaction has touched, with the rest of its log.

    The first end wins, and only an owner of this ``epoch`` writes one, if it is given: else the row as it is.
    """
    now = utc_now()
    saved = {"message_id": message_id or new_id()} if values.get("partial_response") else {}
    given = values | saved | {"updated_at": now, "ended_at": now, "session": id}
    if epoch is None:
        changed = await connection.execute(_FINISH, given)
    else:
        changed = await connection.execute(_FINISH_OWN, {**given, "owners_epoch": epoch})
    row: Row[Any] | None = changed.one_or_none()
    if row is None:
        return await row_of(connection, id)
    await append(connection, id, rows)
    if saved:
        who, how = (row.model, row.provider), saved_as(row.status)
        said = new_message(row.conversation_id, row.partial_response, "llm", row.message_id, *who, how)
        await insert_message(connection, said)
    return row


async def close_if_abandoned(connection: AsyncConnection, *conditions: Any) -> StreamSession | None:
    """End the one session that ``conditions`` name, if its ownership has run out, with what the log has of it.

    Its conversation must have been touched by this transaction.
    """
    query = select(stream_sessions).where(*conditions, IS_ACTIVE, IS_EXPIRED).with_for_update()
    found = (await connection.execute(query)).one_or_none()
    return None if found is None else await _close(connection, found)


async def _close(connection: AsyncConnection, found: Row[Any]) -> StreamSession:
    """End a session that is abandoned, and locked."""
    log = (await written(connection, [found.id]))[found.id]
    values: dict[str, Any] = {"epoch": found.epoch + 1}
    if log.seq:
        values |= {"partial_response": log.text, "token_count": log.token_count}
    elif found.partial_response:
        values["partial_response"] = found.partial_response
    values |= {name: value for name, value in (("model", log.model), ("provider", log.provider)) if value}
    end = _end_of(found, log)
    entry = Entry(Numbered(log.seq + 1, end.event), Origin())
    rows = rows_of([entry], len(log.text), found.epoch + 1) if log.seq else []
    return session_of(await finish(connection, found.id, values | end.values, rows))


@dataclass(frozen=True, slots=True)
class _End:
    values: dict[str, Any]
    event: Event


def _end_of(row: Row[Any], log: Written) -> _End:
    """How a session ends that nobody owns: terminated when that was wanted, or given up by a clean shutdown."""
    reason = row.terminate_reason
    if reason is None and row.owner is None and row.wanted is not None:
        reason = TerminationReason.SERVER_SHUTDOWN.value
    if reason is not None:
        values = {"status": SessionStatus.TERMINATED.value, "termination_reason": reason}
        return _End(values, Terminated(row.id, log.text, log.token_count, reason))
    values = {
        "status": SessionStatus.ERROR.value,
        "termination_reason": TerminationReason.ERROR.value,
        "error_code": ProviderUnavailable.code,
        "error_message": _GONE,
    }
    return _End(values, Failed(ProviderUnavailable.code, _GONE, row.provider, True, row.trace_id or "", {}))


async def claim(connection: AsyncConnection, conversation_id: str) -> str | None:
    """Take the conversation for a new reply; the id of the one that still runs. One whose owner is gone ends here."""
    await touch(connection, conversation_id, utc_now())
    running = (await connection.execute(_RUNNING, {"conversation": conversation_id})).one_or_none()
    if running is None or not running.expired:
        return None if running is None else str(running.id)
    await _close(connection, running)
    return None
