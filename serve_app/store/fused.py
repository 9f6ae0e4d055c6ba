"""What a reply costs PostgreSQL: each of its transactions in one statement.

A transaction of four statements is six messages to the server. Each wakes a process there and the event loop here,
which costs more than what the statements do. PostgreSQL can write several tables in one statement (a ``WITH`` whose
parts write), and that is a transaction of its own.

What these statements do is written step by step in :mod:`serve_app.store.sessions` and
:mod:`serve_app.store.ownership`, for SQLite and for whatever happens seldom. All parts of a statement see the database
as it was when the statement began, so one may collide with a transaction for which it had to wait: then nothing of it
is done, it raises ``IntegrityError``, and the caller takes the long way, which tells what is wrong or finds its place
behind the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, Row, Table, any_, bindparam, column, false, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import insert as insert_or_leave
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import StoredMessage
from serve_app.domain.stream_log import LogRow
from serve_app.store.messages import new_message
from serve_app.store.records import NewConversation, NewSession, Pulse, log_values, message_values, utc_now
from serve_app.store.session_rows import IS_ACTIVE, OWNED, PULSE, saved_as, session
from serve_app.store.tables import CleanText, conversations, messages, stream_events, stream_sessions

END = (
    "status", "partial_response", "token_count", "finish_reason", "termination_reason", "error_code", "error_message",
    "provider_stopped", "prompt_tokens", "completion_tokens", "cached_tokens", "queued_s", "load_s", "ttft_s",
    "decode_s", "total_s", "model", "provider", "message_id",
)  # fmt: skip
LOG = tuple(stream_events.columns)


def _bound(table: Table, names: Collection[str]) -> dict[str, Any]:
    """Parameters for these columns, under names that no other table's have."""
    return {name: bindparam(f"{table.name}_{name}", type_=table.c[name].type) for name in names}


def _given(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of such parameters."""
    return {f"{table.name}_{name}": value for name, value in values.items()}


_ROWS = (
    func.unnest(*(bindparam(f"log_{one.name}", type_=ARRAY(one.type)) for one in LOG))
    .table_valued(*(column(one.name, one.type) for one in LOG), name="rows")
    .render_derived()
)


def _log(batches: Mapping[str, Sequence[LogRow]]) -> dict[str, list[Any]]:
    """The rows as one array for each column: so the statement is the same for any number of them."""
    rows = [log_values(id, row) for id, some in batches.items() for row in some]
    return {f"log_{one.name}": [row[one.name] for row in rows] for one in LOG}


def _logged(of: Any) -> Any:
    """Write those rows that belong to a session of ``of``, in the epoch that it has there."""
    mine = select(*_ROWS.c).join_from(_ROWS, of, (of.c.id == _ROWS.c.session_id) & (of.c.epoch == _ROWS.c.epoch))
    return insert_or_leave(stream_events).from_select(LOG, mine).on_conflict_do_nothing().cte("logged")


_BEGIN = (
    insert(stream_sessions)
    .values(**_bound(stream_sessions, NewSession("", "", "", "", "").values(None)), owned_until_ms=OWNED)
    .add_cte(
        insert(conversations).values(_bound(conversations, NewConversation("", "").values())).cte("begun"),
        insert(messages).values(**_bound(messages, message_values(new_message("", "", "user"))), seq=1).cte("asked"),
    )
)

_TOUCHED = (
    update(conversations)
    .where(
        conversations.c.id
        == select(session.conversation_id).where(session.id == bindparam("session")).scalar_subquery()
    )
    .values(updated_at=bindparam("now"))
    .returning(conversations.c.id)
    .cte("touched")
)
# It reads what the first part gives, so that it comes second: see serve_app.store.conversations.touch.
_ENDED = (
    update(stream_sessions)
    .where(
        session.id == bindparam("session"),
        session.conversation_id.in_(select(_TOUCHED.c.id)),
        session.epoch == bindparam("owners_epoch"),
        IS_ACTIVE,
    )
    .values(**_bound(stream_sessions, END), owned_until_ms=None, updated_at=bindparam("now"), ended_at=bindparam("now"))
    .returning(stream_sessions)
    .cte("ended")
)
_LAST = select(func.coalesce(func.max(messages.c.seq), 0)).where(messages.c.conversation_id == _ENDED.c.conversation_id)
_SAID = {
    "id": _ENDED.c.message_id,
    "conversation_id": _ENDED.c.conversation_id,
    "text": _ENDED.c.partial_response,
    "sender": literal("llm"),
    "timestamp": _ENDED.c.ended_at,
    "created_at": _ENDED.c.ended_at,
    "has_images": false(),
    "status": bindparam("saved_as", type_=CleanText()),
    "model": _ENDED.c.model,
    "provider": _ENDED.c.provider,
    "seq": _LAST.correlate(_ENDED).scalar_subquery() + 1,
}
_FINISH = select(_ENDED).add_cte(
    _logged(_ENDED),
    insert(messages)
    .from_select(list(_SAID), select(*_SAID.values()).where(_ENDED.c.message_id.is_not(None)))
    .cte("said"),
)

_MINE = (
    session.id == any_(bindparam("ids", type_=ARRAY(session.id.type))),
    session.owner == bindparam("me"),
    IS_ACTIVE,
)
_SEEN = select(*PULSE).where(*_MINE).with_for_update(read=True).cte("mine")
_RENEWED = (
    update(stream_sessions)
    .where(*_MINE)
    .values(owned_until_ms=OWNED, updated_at=bindparam("now"))
    .returning(*PULSE)
    .cte("mine")
)
_WRITE = select(_SEEN).add_cte(_logged(_SEEN))
_WRITE_AND_RENEW = select(_RENEWED).add_cte(_logged(_RENEWED))


async def begin(
    connection: AsyncConnection, new: NewSession, question: StoredMessage, conversation: NewConversation
) -> None:
    """Keep a conversation with its first message, and open the session that answers it."""
    values = _given(conversations, conversation.values()) | _given(messages, message_values(question))
    await connection.execute(_BEGIN, values | _given(stream_sessions, new.values(question.id)) | new.lease())


async def finish(
    connection: AsyncConnection,
    id: str,
    values: Mapping[str, Any],
    rows: Sequence[LogRow],
    epoch: int,
) -> Row[Any] | None:
    """End an active session of this ``epoch``, with the rest of its log and its message; None when there is none.

    ``values``: of the columns :data:`END`; with a ``message_id`` when there is a reply to save.
    """
    assert values.keys() == set(END), values.keys() ^ set(END)
    given = _given(stream_sessions, values) | {"session": id, "owners_epoch": epoch, "now": utc_now()}
    given |= _log({id: rows}) | {"saved_as": saved_as(values["status"]).value}
    return (await connection.execute(_FINISH, given)).one_or_none()


async def write_log(
    connection: AsyncConnection,
    owner: str,
    ids: Collection[str],
    batches: Mapping[str, Sequence[LogRow]],
    renew_s: float | None,
) -> dict[str, Pulse]:
    """See :meth:`serve_app.store.ownership.Ownership.write_log`."""
    given: dict[str, Any] = {"ids": list(ids), "me": owner, **_log(batches)}
    if renew_s is not None:
        given |= {"ttl_ms": int(renew_s * 1000), "now": utc_now()}
    rows = await connection.execute(_WRITE if renew_s is None else _WRITE_AND_RENEW, given)
    return {row.id: Pulse(row.epoch, row.terminate_reason) for row in rows}
