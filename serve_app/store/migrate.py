"""Brings a database to a revision of the schema, one process at a time.

The functions block: call them from a thread, or use :func:`upgrade_async`. They raise InvalidConfig for a database
that is not ours and ProviderUnavailable for one that cannot be reached.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from filelock import FileLock, Timeout
from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import URL

from serve_app.domain.errors import InvalidConfig, ProviderUnavailable
from serve_app.store.engine import make_engine, parse_url, sqlite_file, translated, writer

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

LOCK_WAIT_S = 120.0
# Any fixed number will do, as long as every release uses the same one.
_ADVISORY_LOCK = 0x526F74756E6461

# Alembic's `op` and `context` are globals of its own: two threads must not migrate at once, not even two databases.
_alembic_turn = threading.Lock()

# The columns by which a database of the chat service is recognised.
_CHAT_SERVICE = {
    "conversations": "id tab_name llm_model is_private password_hash created_at updated_at",
    "messages": "id conversation_id text sender timestamp created_at has_images",
    "images": "id conversation_id message_id filename file_path file_size mime_type content_hash created_at"
    " expires_at deleted_at",
    "stream_sessions": "id conversation_id model status started_at updated_at ended_at partial_response token_count"
    " termination_reason error_message timeout_ms created_at",
}


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to ``revision``, creating a SQLite file and its folder when they are missing.

    A database that the chat service made, which has no revision, is taken over: it counts as 0001.
    """

    def run(connection: Connection) -> None:
        config = _config(connection)
        if current_revision(connection) is None and _is_chat_service(connection):
            logger.info("Taking over a database of the chat service as revision 0001")
            command.stamp(config, "0001")
        command.upgrade(config, revision)

    _migrate(parse_url(url), run)


def downgrade(url: str, revision: str) -> None:
    """Take the database back to ``revision``; ``base`` removes every table."""
    _migrate(parse_url(url), lambda connection: command.downgrade(_config(connection), revision))


def current(url: str) -> str | None:
    """The database's revision; None when it has none or the SQLite file does not exist."""
    parsed = parse_url(url)
    file = sqlite_file(parsed)
    if file is not None and not file.exists():
        return None
    with translated():
        return asyncio.run(_in_transaction(parsed, current_revision))


def head() -> str:
    """The newest revision, which this release needs."""
    revision = _scripts().get_current_head()
    assert revision is not None
    return revision


async def upgrade_async(url: str, revision: str = "head") -> None:
    """:func:`upgrade` in a thread of its own."""
    await asyncio.to_thread(upgrade, url, revision)


def current_revision(connection: Connection) -> str | None:
    """The revision that the database records."""
    return MigrationContext.configure(connection).get_current_revision()


def _migrate(url: URL, step: Callable[[Connection], None]) -> None:
    try:
        with _alembic_turn, _file_turn(sqlite_file(url)), translated():
            asyncio.run(_in_transaction(url, step, writes=True))
    except CommandError as error:
        logger.error("The migration failed", exc_info=error)
        raise InvalidConfig(f"The database cannot be migrated: {error}. Is it from a newer release?") from error


@contextmanager
def _file_turn(file: Path | None) -> Iterator[None]:
    """Hold the lock file beside a SQLite database. PostgreSQL locks inside the transaction."""
    if file is None:
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"The folder of the database, {file.parent}, cannot be made: {error.strerror}.") from error
    try:
        with FileLock(file.with_name(file.name + ".migrate.lock"), timeout=LOCK_WAIT_S):
            yield
    except Timeout as error:
        raise ProviderUnavailable("Another process has been migrating the database for two minutes.") from error


async def _in_transaction(url: URL, step: Callable[[Connection], _T], writes: bool = False) -> _T:
    """Run ``step`` in one transaction on an engine of its own: a failed migration leaves no trace."""
    # Rebuilding a table drops the old one; with foreign keys on, that would delete every row that refers to it.
    engine = make_engine(url, foreign_keys=False)
    try:
        async with (writer(engine) if writes else engine).begin() as connection:
            if writes and connection.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            return await connection.run_sync(step)
    finally:
        await engine.dispose()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _is_chat_service(connection: Connection) -> bool:
    """Whether the tables of the chat service are there; part of them, or other columns, is InvalidConfig."""
    inspector = inspect(connection)
    present = set(inspector.get_table_names()) & set(_CHAT_SERVICE)
    if not present:
        return False
    missing = [table for table in _CHAT_SERVICE if table not in present]
    for table in present:
        columns = {column["name"] for column in inspector.get_columns(table)}
        missing += [f"{table}.{name}" for name in _CHAT_SERVICE[table].split() if name not in columns]
    if missing:
        raise InvalidConfig(
            "The database has tables named like ours but is neither Rotunda's nor the chat service's: it lacks "
            f"{', '.join(sorted(missing))}. Name another database in DATABASE_URL."
        )
    return True
