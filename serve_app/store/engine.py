"""The connection to the database: transactions, SQLite's settings, and the translation of the library's errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from serve_app.domain.errors import Internal, InvalidConfig, ProviderUnavailable
from serve_app.store.sqlite import Work, Writer, creator, set_up

logger = logging.getLogger(__name__)

# Milliseconds that a statement waits for another process's write transaction.
SQLITE_BUSY_MS = 10_000
# aiosqlite runs one thread per connection: four readers and a writer.
SQLITE_CONNECTIONS = 5
# Of each ingress. Kept open once made: a new one costs the server a process, and both sides their prepared statements.
POSTGRES_CONNECTIONS = 15

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
# What says "not now" rather than "not like that". SQLSTATE: connection, login, no such database, rollback (deadlock),
# resources, operator intervention (shutdown), lock not available.
_TRANSIENT_SQLSTATES = ("08", "28", "3D", "40", "53", "57", "55P03")
# SQLite's primary result codes: busy, locked, input/output, disk full, cannot open, locking protocol.
_TRANSIENT_SQLITE = {5, 6, 10, 13, 14, 15}
_WRITES = "rotunda_writes"

_T = TypeVar("_T")
_P = ParamSpec("_P")


def parse_url(text: str) -> URL:
    """The database URL with its asynchronous driver.

    Raises InvalidConfig for another kind of database, and for SQLite without a file: replicas share the file.
    """
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise InvalidConfig("DATABASE_URL is not a URL. An example: sqlite+aiosqlite:///data/rotunda.db") from error
    driver = _DRIVERS.get(url.drivername)
    if driver is None:
        raise InvalidConfig(
            f"DATABASE_URL names {url.drivername!r}; use sqlite+aiosqlite:///FILE or postgresql+asyncpg://HOST/NAME."
        )
    if driver.startswith("sqlite") and (not url.database or url.database.startswith((":memory:", "file:"))):
        raise InvalidConfig("DATABASE_URL must name a file for SQLite, like sqlite+aiosqlite:///data/rotunda.db")
    return url.set(drivername=driver)


def check_nodes(url: str, nodes: int) -> None:
    """Refuse SQLite on a cluster of several nodes: each would have a file of its own.

    Raises:
        InvalidConfig: it is so.
    """
    if url.startswith("sqlite") and nodes > 1:
        raise InvalidConfig(
            f"The cluster has {nodes} nodes, and DATABASE_URL is a SQLite file, which only one of them has. "
            "Use PostgreSQL: postgresql+asyncpg://HOST/NAME"
        )


def sqlite_file(url: URL) -> Path | None:
    """The file of a SQLite URL; None for PostgreSQL."""
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def make_engine(url: URL, *, foreign_keys: bool = True) -> AsyncEngine:
    """An engine whose SQLite connections begin their transactions themselves.

    Parameters never reach logs or errors: they hold what people write.
    """
    if sqlite_file(url) is None:
        return _postgres_engine(url)
    engine = create_async_engine(
        url, hide_parameters=True, pool_size=SQLITE_CONNECTIONS, max_overflow=0, async_creator=creator(url)
    )

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        set_up(connection, _pragmas(foreign_keys))

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads and then writes fails at once when another process wrote in between,
        # whatever the busy timeout; an immediate one waits its turn.
        writes = connection.get_execution_options().get(_WRITES, False)
        driver: Any = connection.connection.driver_connection
        driver.begin_with = "BEGIN IMMEDIATE" if writes else "BEGIN"

    return engine


def _pragmas(foreign_keys: bool = True) -> tuple[str, ...]:
    return (
        f"busy_timeout={SQLITE_BUSY_MS}",
        "journal_mode=WAL",
        "synchronous=NORMAL",
        f"foreign_keys={'ON' if foreign_keys else 'OFF'}",
    )


def _postgres_engine(url: URL) -> AsyncEngine:
    """An engine that asks the server nothing before a transaction: the driver hears when a connection is closed."""
    engine = create_async_engine(
        url, hide_parameters=True, pool_size=POSTGRES_CONNECTIONS, max_overflow=0, pool_use_lifo=True
    )

    @event.listens_for(engine.sync_engine, "checkout")
    def look(connection: Any, record: Any, proxy: Any) -> None:
        if connection.driver_connection.is_closed():
            raise DisconnectionError("the server has closed the connection")

    return engine


def writer(engine: AsyncEngine) -> AsyncEngine:
    """The same engine and pool, for transactions that write."""
    return engine.execution_options(**{_WRITES: True})


def reader(engine: AsyncEngine) -> AsyncEngine:
    """The same engine and pool, for what only reads. PostgreSQL's statements see what is committed when each begins, in
    a transaction or not: without one a reading is one message to the server and not three."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def translated() -> Iterator[None]:
    """Turn what SQLAlchemy and the drivers raise into our errors; the original goes to the log."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        logger.error("The conversation store failed: %s", type(error).__name__, exc_info=error)
        if _is_transient(error):
            raise ProviderUnavailable("The conversation store cannot be reached now. Try again shortly.") from error
        raise Internal.masked() from error


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError | PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    sqlite_code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    state = getattr(error.orig, "sqlstate", None) or ""
    return error.connection_invalidated or sqlite_code in _TRANSIENT_SQLITE or state.startswith(_TRANSIENT_SQLSTATES)


class Database:
    """Transactions on one engine: reads run side by side, and SQLite has one writer per process at a time.

    Args:
        url: of the database.
        check: raises when the database must not be used; asked before every transaction until it passes.
    """

    def __init__(self, url: URL, check: Callable[[Connection], None] | None = None) -> None:
        self.url = url
        self._check = check
        self._engine = make_engine(url)
        self._writer, self._reader = writer(self._engine), reader(self._engine)
        self._turn: AbstractAsyncContextManager[Any] = asyncio.Lock() if sqlite_file(url) else nullcontext()
        self._at_once = Writer(url, _pragmas()) if sqlite_file(url) else None
        self._running: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string(hide_password=True)!r})"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads: one snapshot of the database on SQLite."""
        with translated():
            await self._checked()
            async with self._reader.begin() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that may write: kept whole when the block ends, dropped whole when it raises.

        On SQLite it has its turn among the processes from its first statement on.
        """
        with translated():
            await self._checked()
            async with self._turn, self._writer.begin() as connection:
                yield connection

    async def write_at_once(self, work: Work[_T]) -> _T:
        """What ``work`` returns, which is a transaction as in :meth:`write`; it may wait for its statements only.

        For what every reply writes: on SQLite all that wait take their turn together, without the event loop.
        """
        if self._at_once is None:
            async with self.write() as connection:
                return await work(connection)
        with translated():
            await self._checked()
            outcome, first = self._at_once.add(work)
            if first:
                self._spawn(self._drain(self._at_once))
            return await outcome

    async def _drain(self, writer: Writer) -> None:
        async with self._turn:
            await writer.drain()

    @property
    def fuses(self) -> bool:
        """Whether one statement can do what a transaction does: see :mod:`serve_app.store.fused`."""
        return self._engine.dialect.name == "postgresql"

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[AsyncConnection]:
        """For statements that are transactions of their own, where the database :attr:`fuses`."""
        async with self.read() as connection:
            yield connection

    async def _checked(self) -> None:
        if self._check is not None:
            async with self._engine.begin() as connection:
                await connection.run_sync(self._check)
            self._check = None

    async def carry_out(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await ``work``, which goes on to its end when the caller is cancelled: see :func:`whole`."""
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return task

    async def close(self) -> None:
        """Wait for the work that cancelled callers left behind, then close all connections."""
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._at_once is not None:
            await self._at_once.close()
        await self._engine.dispose()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # logged where it was translated; nobody may be left to retrieve it


class _HasDatabase(Protocol):
    _db: Database


_S = TypeVar("_S", bound=_HasDatabase)


def whole(
    method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    """Let a method of the store reach its end even when its caller is cancelled in the middle.

    A client that goes away must not cut a transaction: a driver that is interrupted there gives up its connection,
    and nobody could tell whether the commit took place.
    """

    @wraps(method)
    async def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._db.carry_out(method(self, *args, **kwargs))

    return call
