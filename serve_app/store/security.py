"""The key that signs tokens, and the count of password attempts: shared by all replicas."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.store.engine import Database, whole
from serve_app.store.records import utc_now
from serve_app.store.tables import password_attempts, signing_keys

_KEY_BYTES = 32
_KEY_NAME = "tokens"
# Longer than any window that attempts are counted in.
_ATTEMPTS_KEPT = timedelta(hours=1)


class Security:
    """The part of the store that replicas share secrets and counts by."""

    _db: Database

    @whole
    async def signing_key(self) -> bytes:
        """The 32 random bytes that sign tokens; the first call of all replicas makes them."""
        query = select(signing_keys.c.key).where(signing_keys.c.name == _KEY_NAME)
        async with self._db.read() as connection:
            key = await connection.scalar(query)
        if key is not None:
            return bytes(key)
        row = {"name": _KEY_NAME, "key": secrets.token_bytes(_KEY_BYTES), "created_at": utc_now()}
        async with self._db.write() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            await connection.execute(dialect.insert(signing_keys).values(row).on_conflict_do_nothing())
            return bytes((await connection.execute(query)).scalar_one())

    @whole
    async def record_password_attempt(self, conversation_id: str, address: str, now: datetime) -> None:
        """Count one attempt at ``now`` and forget those of more than an hour before."""
        async with self._db.write() as connection:
            await _record(connection, conversation_id, address, now)

    @whole
    async def count_password_attempts(self, conversation_id: str, address: str, since: datetime) -> int:
        """The attempts after ``since`` on one conversation from one address."""
        async with self._db.read() as connection:
            return await _count(connection, conversation_id, address, since)

    @whole
    async def allow_password_attempt(
        self,
        conversation_id: str,
        address: str,
        limit: int = 5,
        window_s: float = 60.0,
        now: datetime | None = None,
    ) -> bool:
        """Whether one more attempt is within ``limit`` per ``window_s`` seconds; if so it is counted.

        Counting and recording are one step, for all replicas. A refused attempt does not count. At most one hour.
        """
        at = now or utc_now()
        async with self._db.write() as connection:
            await _queue_up(connection, conversation_id)
            since = at - timedelta(seconds=window_s)
            if await _count(connection, conversation_id, address, since) >= limit:
                return False
            await _record(connection, conversation_id, address, at)
            return True

    async def forget_password_attempts(self, conversation_id: str, address: str) -> None:
        """Clear the count: the right password was given from this address."""
        attempts = password_attempts.c
        mine = (attempts.conversation_id == conversation_id) & (attempts.address == address)
        async with self._db.write() as connection:
            await connection.execute(delete(password_attempts).where(mine))


async def _queue_up(connection: AsyncConnection, conversation_id: str) -> None:
    """Let the attempts on one conversation in one by one, until this transaction ends. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        await connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(conversation_id, 0))))


async def _count(connection: AsyncConnection, conversation_id: str, address: str, since: datetime) -> int:
    query = select(func.count()).where(
        password_attempts.c.conversation_id == conversation_id,
        password_attempts.c.address == address,
        password_attempts.c.attempted_at > since,
    )
    return int(await connection.scalar(query) or 0)


async def _record(connection: AsyncConnection, conversation_id: str, address: str, now: datetime) -> None:
    await connection.execute(delete(password_attempts).where(password_attempts.c.attempted_at < now - _ATTEMPTS_KEPT))
    row = {"conversation_id": conversation_id, "address": address, "attempted_at": now}
    await connection.execute(insert(password_attempts).values(row))
