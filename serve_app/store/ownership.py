"""Who writes a stream: ownership by the database's clock, the log that only the owner writes, and what becomes of both.

Every owner of a session has a number, its epoch. Whoever writes names its own, and the session's row is locked while
it does: an ingress that had stalled, and whose stream another has adopted, finds that its writes are refused.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, delete, literal_column, not_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import StreamSession
from serve_app.domain.errors import NotFound
from serve_app.domain.stream_log import LogRow
from serve_app.store import fused
from serve_app.store.conversations import touch
from serve_app.store.engine import Database, whole
from serve_app.store.files import chunks
from serve_app.store.records import Adopted, Pulse, SessionState, log_row_of, session_of, utc_now
from serve_app.store.session_rows import (
    IS_ACTIVE,
    IS_EXPIRED,
    OWNED,
    PULSE,
    append,
    append_many,
    close_if_abandoned,
    events,
    row_of,
    session,
    until,
)
from serve_app.store.tables import ACTIVE, database_ms, stream_events, stream_sessions

MAX_EPOCHS = 6
"""A stream whose owners keep dying is not adopted once more: it may be what kills them."""
_HOPELESS = or_(session.wanted.is_(None), session.epoch >= MAX_EPOCHS, session.terminate_reason.is_not(None))
_PRUNED_AT_ONCE = 200
_MINE = (session.id.in_(bindparam("ids", expanding=True)), session.owner == bindparam("me"), IS_ACTIVE)
_LOOK = select(*PULSE).where(*_MINE)
_LOOK_LOCKED = _LOOK.with_for_update(read=True)
_RENEW = (
    update(stream_sessions).where(*_MINE).values(owned_until_ms=OWNED, updated_at=bindparam("now")).returning(*PULSE)
)
_HAS_LOG: Any = literal_column("has_log")


@dataclass(frozen=True, slots=True)
class Abandoned:
    """An active session whose ownership ran out ``for_s`` seconds ago."""

    session: StreamSession
    for_s: float


class Ownership:
    """The part of the store that keeps owners and logs of stream sessions."""

    _db: Database

    @whole
    async def write_log(
        self,
        owner: str,
        ids: Collection[str],
        batches: Mapping[str, Sequence[LogRow]],
        renew_s: float | None = None,
    ) -> dict[str, Pulse]:
        """One transaction for all streams of an owner: write their rows, and learn how the sessions ``ids`` stand.

        ``renew_s``: own them for so many seconds more by the database's clock. Rows of a session that ``owner`` no
        longer owns, or in another epoch than theirs, are left out; whoever generates it must stop without a word.
        Rows that are there already stay as they are, so a batch may be written twice.
        """
        writes = renew_s is not None or any(batches.values())
        if writes and self._db.fuses:
            async with self._db.alone() as connection:
                return await fused.write_log(connection, owner, ids, batches, renew_s)
        statement = _RENEW if renew_s is not None else _LOOK_LOCKED if writes else _LOOK

        async def logged(connection: AsyncConnection) -> dict[str, Pulse]:
            pulses: dict[str, Pulse] = {}
            for some in chunks(ids):
                given: dict[str, Any] = {"ids": some, "me": owner}
                if renew_s is not None:
                    given |= {"ttl_ms": int(renew_s * 1000), "now": utc_now()}
                for row in await connection.execute(statement, given):
                    pulses[row.id] = Pulse(row.epoch, row.terminate_reason)
            kept = [
                (id, [row for row in rows if row.epoch == pulses[id].epoch])
                for id, rows in batches.items()
                if id in pulses
            ]
            await append_many(connection, kept)
            return pulses

        if writes:
            return await self._db.write_at_once(logged)
        async with self._db.read() as connection:
            return await logged(connection)

    @whole
    async def read_log(self, positions: Mapping[str, int]) -> dict[str, tuple[SessionState, list[LogRow]]]:
        """How sessions stand, and the rows of their logs after the given event numbers; nothing of one that is gone.

        The states are read first: a log that is read after its session had ended is complete.
        """
        found: dict[str, tuple[SessionState, list[LogRow]]] = {}
        async with self._db.read() as connection:
            for some in chunks(positions):
                states = select(session.id, session.status, IS_EXPIRED.label("expired")).where(session.id.in_(some))
                for row in await connection.execute(states):
                    active = row.status == ACTIVE
                    found[row.id] = SessionState(active, active and bool(row.expired)), []
            for id, (_, rows) in found.items():
                query = select(stream_events).where(events.session_id == id, events.seq > positions[id])
                rows += [log_row_of(row) for row in await connection.execute(query.order_by(events.seq))]
        return found

    @whole
    async def abandoned_sessions(self) -> list[Abandoned]:
        """The active sessions whose ownership has run out by the database's clock, oldest first."""
        age = (database_ms() - session.owned_until_ms).label("age")
        query = select(stream_sessions, age).where(IS_ACTIVE, IS_EXPIRED).order_by(session.started_at)
        async with self._db.read() as connection:
            return [
                Abandoned(session_of(row), float("inf") if row.age is None else row.age / 1000)
                for row in await connection.execute(query)
            ]

    @whole
    async def adopt_session(
        self, id: str, owner: str, ttl_s: float = 5.0, within_s: float = float("inf")
    ) -> Adopted | None:
        """Take over an abandoned session that can be gone on with, and read its log.

        None when somebody else did, or it is owned, has ended or should; when nothing says how its reply is wanted; or
        when it had too many owners already. Its log is then complete up to here, whatever the former owner still tries.
        None also when the turn to write comes later than ``within_s`` seconds: then the owner may have been waiting for
        its turn just so, in order to renew.
        """
        asked = time.monotonic()
        change = update(stream_sessions).where(session.id == id, IS_ACTIVE, IS_EXPIRED, not_(_HOPELESS))
        change = change.values(owner=owner, owned_until_ms=until(ttl_s), epoch=session.epoch + 1)
        async with self._db.write() as connection:
            await connection.exec_driver_sql("SELECT 1")  # with it the turn comes
            if time.monotonic() - asked > within_s:
                return None
            row = (await connection.execute(change.returning(stream_sessions))).one_or_none()
            if row is None:
                return None
            log = select(stream_events).where(events.session_id == id).order_by(events.seq)
            return Adopted(session_of(row), [log_row_of(found) for found in await connection.execute(log)])

    @whole
    async def release_session(self, id: str, epoch: int, rows: Sequence[LogRow]) -> bool:
        """Give a session up, with the rest of its log, to whoever adopts it; False when it was ours no more."""
        async with self._db.write() as connection:
            row = await row_of(connection, id, lock=True)
            if row.status != ACTIVE or row.epoch != epoch:
                return False
            await append(connection, id, rows)
            change = update(stream_sessions).where(session.id == id)
            await connection.execute(change.values(owner=None, owned_until_ms=until(-0.001)))
            return True

    @whole
    async def close_abandoned(self, ids: Collection[str] | None = None, hopeless: bool = False) -> list[StreamSession]:
        """End abandoned sessions, of ``ids`` or all, with their partial replies saved; those that this call ended.

        They end as ERROR, or as TERMINATED when that had been asked for or their owner gave them up. ``hopeless``: only
        those that nobody may adopt.
        """
        fit = [_HOPELESS] if hopeless else []
        closed: list[StreamSession] = []
        for one in await self.abandoned_sessions():
            if ids is not None and one.session.id not in ids:
                continue
            async with self._db.write() as connection:
                try:
                    await touch(connection, one.session.conversation_id, utc_now())
                except NotFound:
                    continue
                ended = await close_if_abandoned(connection, session.id == one.session.id, *fit)
                if ended is not None:
                    closed.append(ended)
        return closed

    @whole
    async def prune_log(self, before: datetime) -> int:
        """Delete the logs of sessions that ended before that time, some at once; how many sessions it were."""
        old = select(session.id).where(_HAS_LOG, session.ended_at < before).order_by(session.ended_at)
        async with self._db.write() as connection:
            ids = list(await connection.scalars(old.limit(_PRUNED_AT_ONCE)))
            for some in chunks(ids):
                await connection.execute(delete(stream_events).where(events.session_id.in_(some)))
                await connection.execute(update(stream_sessions).where(session.id.in_(some)).values(has_log=False))
            return len(ids)
