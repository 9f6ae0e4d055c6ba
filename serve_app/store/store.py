"""The store: everything that outlives a process, for all replicas, on SQLite or PostgreSQL."""

from __future__ import annotations

from sqlalchemy import Connection, text
from sqlalchemy.engine import URL

from serve_app.domain.errors import InvalidConfig, ProviderUnavailable
from serve_app.store import migrate
from serve_app.store.conversations import Conversations
from serve_app.store.engine import Database, parse_url, sqlite_file, whole
from serve_app.store.files import Images
from serve_app.store.fleet import FleetMemory
from serve_app.store.messages import Messages
from serve_app.store.ownership import Ownership
from serve_app.store.security import Security
from serve_app.store.sessions import Sessions


class Store(Conversations, Messages, Images, Sessions, Ownership, Security, FleetMemory):
    """One database, open. ``Store.open(url)`` makes one; ``close()`` it in the event loop that opened it.

    Every method is one transaction. Each raises ProviderUnavailable (worth another try) when the database cannot be
    reached or stays locked, and Internal for a fault of ours; the cause is in the log.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    @classmethod
    async def open(cls, url: str) -> Store:
        """Open the database at ``url``, whose schema must be the one of this release.

        Raises InvalidConfig for another schema or a bad URL, ProviderUnavailable when it cannot be reached.
        """
        parsed = parse_url(url)
        _refuse_missing(parsed)
        store = cls(Database(parsed, _check_schema))
        try:
            await store.ping()
        except BaseException:
            await store.close()
            raise
        return store

    @classmethod
    def attach(cls, url: str) -> Store:
        """Open a database that may not be there yet, or not yet have the schema of this release.

        Until it is and has, every method raises ProviderUnavailable, which says what is wrong and what to do. Raises
        InvalidConfig for a bad URL.
        """
        parsed = parse_url(url)

        def check(connection: Connection) -> None:
            try:
                _check_schema(connection)
            except InvalidConfig as error:
                raise ProviderUnavailable(error.message) from error

        return cls(Database(parsed, check))

    @whole
    async def ping(self) -> None:
        """Ask the database for a sign of life."""
        async with self._db.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close all connections."""
        await self._db.close()

    def __repr__(self) -> str:
        return f"Store({self._db!r})"


def _refuse_missing(url: URL) -> None:
    """SQLite would make an empty file of a mistyped name."""
    file = sqlite_file(url)
    if file is not None and not file.exists():
        _refuse_revision(None)


def _check_schema(connection: Connection) -> None:
    revision = migrate.current_revision(connection)
    if revision != migrate.head():
        _refuse_revision(revision)


def _refuse_revision(found: str | None) -> None:
    raise InvalidConfig(
        f"The conversation store has schema revision {found or 'none'}, and this release needs {migrate.head()}. "
        "Run: rotunda db upgrade"
    )
