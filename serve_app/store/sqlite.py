"""SQLite behind SQLAlchemy's asyncio: one visit to the connection's thread per statement, or per transaction.

SQLAlchemy's adapter visits it four times for each statement: to make a cursor, to execute, to fetch, to close the
cursor. Every visit wakes a thread and then the event loop, which costs more than most of our statements, and in a busy
event loop it also waits for its turn there. So what every reply writes is a transaction of one visit (:class:`Writer`):
the next one need not wait until the event loop has come round between its statements.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import aiosqlite
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import CursorResult, Dialect, Engine, create_engine, event
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection

_ITERATED = 64
"""Rows that aiosqlite fetches at once where it iterates; we do not."""

_T = TypeVar("_T")
Work = Callable[[AsyncConnection], Coroutine[Any, Any, _T]]
"""What a transaction does: it awaits nothing but the connection that it is given."""


class _AtOnce:
    """What our transactions ask of an ``AsyncConnection``, over one whose statements are done when they return."""

    def __init__(self, connection: SyncConnection) -> None:
        self._connection = connection

    @property
    def dialect(self) -> Dialect:
        return self._connection.dialect

    async def execute(self, statement: Any, parameters: Any = None) -> CursorResult[Any]:
        return self._connection.execute(statement, parameters)

    async def scalar(self, statement: Any, parameters: Any = None) -> Any:
        return self._connection.scalar(statement, parameters)


class Writer:
    """Transactions that write, one after the other in a thread of their own, each in one visit.

    Args:
        url: of the file.
        pragmas: of the connection.
    """

    def __init__(self, url: URL, pragmas: Sequence[str]) -> None:
        self._engine = _engine(url, pragmas)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._waiting: list[tuple[Work[Any], asyncio.Future[Any]]] = []

    def add(self, work: Work[_T]) -> tuple[asyncio.Future[_T], bool]:
        """Let ``work`` be in the next :meth:`drain`; its outcome, and whether somebody must see to that one."""
        outcome: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, outcome))
        return outcome, len(self._waiting) == 1

    async def drain(self) -> None:
        """Carry out what waits. Each is a transaction of its own, and its outcome is known as soon as it has ended."""
        waiting, self._waiting = self._waiting, []
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._carry_out, waiting, loop)

    def _carry_out(
        self, waiting: Sequence[tuple[Work[Any], asyncio.Future[Any]]], loop: asyncio.AbstractEventLoop
    ) -> None:
        for work, outcome in waiting:
            try:
                with self._engine.begin() as connection:
                    found = _run(work(cast(AsyncConnection, _AtOnce(connection))))
            except Exception as error:  # whatever it is, it is that of whoever waits for it
                tell = partial(_settle, outcome, None, error)
            else:
                tell = partial(_settle, outcome, found, None)
            loop.call_soon_threadsafe(tell)

    async def close(self) -> None:
        """Close the connection; nothing may wait any more."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown()


def _settle(outcome: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    if outcome.done():  # nobody waits any more
        return
    if error is None:
        outcome.set_result(found)
    else:
        outcome.set_exception(error)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast(_T, end.value)
    work.close()
    raise AssertionError("a transaction waited for something else than its statements")


def _engine(url: URL, pragmas: Sequence[str]) -> Engine:
    """One connection, whose transactions take the file's turn to write when they begin."""
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"),
        hide_parameters=True,
        pool_size=1,
        max_overflow=0,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        set_up(connection, pragmas)

    @event.listens_for(engine, "begin")
    def begin(connection: SyncConnection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def set_up(connection: Any, pragmas: Sequence[str]) -> None:
    """Prepare a new connection, which leaves transactions to us."""
    # Without this the driver begins transactions by itself, deferred, and not at all before DDL.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in pragmas:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


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
