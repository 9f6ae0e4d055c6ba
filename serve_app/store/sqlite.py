"""SQLite behind SQLAlchemy's asyncio: one visit to the connection's thread per statement.

SQLAlchemy's adapter visits it four times for each: to make a cursor, to execute, to fetch, to close the cursor. Every
visit wakes a thread and then the event loop, which costs more than most of our statements.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiosqlite
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.engine import URL

_ITERATED = 64
"""Rows that aiosqlite fetches at once where it iterates; we do not."""


class _Cursor:
    """What SQLAlchemy asks of a cursor of aiosqlite. All rows are there when ``execute`` returns."""

    arraysize = 1

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None

    async def __aenter__(self) -> _Cursor:
        return self

    async def execute(self, sql: str, parameters: Any = ()) -> _Cursor:
        await self._visit(sqlite3.Cursor.execute, sql, parameters)
        return self

    async def executemany(self, sql: str, parameters: Any) -> _Cursor:
        await self._visit(sqlite3.Cursor.executemany, sql, parameters)
        return self

    async def fetchall(self) -> Sequence[Any]:
        rows, self._rows = self._rows, []
        return rows

    async def close(self) -> None:
        self._rows = []

    async def _visit(self, call: Callable[..., sqlite3.Cursor], *given: Any) -> None:
        begin, self._connection.begin_with = self._connection.begin_with, None
        found = await self._connection._execute(self._in_thread, begin, call, *given)  # type: ignore[no-untyped-call]
        self.description, self._rows, self.rowcount, self.lastrowid = found

    def _in_thread(
        self, begin: str | None, call: Callable[..., sqlite3.Cursor], *given: Any
    ) -> tuple[Any, list[Any], int, int | None]:
        cursor = self._connection._conn.cursor()
        try:
            if begin is not None:
                cursor.execute(begin)
            call(cursor, *given)
            rows = cursor.fetchall() if cursor.description else []
            return cursor.description, rows, cursor.rowcount, cursor.lastrowid
        finally:
            cursor.close()


class Connection(aiosqlite.Connection):
    """A connection whose cursors are those above."""

    begin_with: str | None = None
    """Begins the transaction, together with its first statement."""

    async def commit(self) -> None:
        await self._end(super().commit)

    async def rollback(self) -> None:
        await self._end(super().rollback)

    async def _end(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self.begin_with is None:
            await end()
        self.begin_with = None  # a transaction without statements never began

    def cursor(self) -> _Cursor:  # type: ignore[override]
        return _Cursor(self)


def creator(url: URL) -> Callable[[], Connection]:
    """What makes connections to the file of a URL; each is awaited by SQLAlchemy."""
    (file,), options = SQLiteDialect_aiosqlite().create_connect_args(url)

    def connect() -> Connection:
        connection = Connection(lambda: sqlite3.connect(file, **options), _ITERATED)
        connection._thread.daemon = True
        return connection

    return connect
