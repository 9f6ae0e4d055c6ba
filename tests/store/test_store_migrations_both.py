"""Migrations on both databases: up, down and up again with data in place, several processes at once, none at all."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect

from serve_app.domain.conversation import SessionStatus
from serve_app.domain.errors import InvalidConfig, ProviderUnavailable
from serve_app.domain.events import Numbered, Token
from serve_app.domain.stream_log import Entry, Origin, rows_of
from serve_app.domain.wanted import Wanted
from serve_app.store import NewSession, Store, migrate, new_id
from serve_app.store.engine import check_nodes, make_engine, parse_url
from serve_app.store.tables import metadata
from tests.postgres import Postgres

# What a database of the first schema holds, in words that both databases take.
ROWS = """
INSERT INTO conversations (id, tab_name, llm_model, is_private, password_hash, created_at, updated_at) VALUES
  ('c1', 'First', 'llama3', FALSE, NULL, '2024-05-01 10:00:00', '2024-05-01 12:00:00'),
  ('c2', 'Second', NULL, TRUE, '$2b$04$abc', '2024-04-01 08:00:00', '2024-04-01 08:00:00');
INSERT INTO messages (id, conversation_id, text, sender, timestamp, created_at, has_images) VALUES
  ('m1', 'c1', 'hello', 'user', '2024-05-01 10:00:00', '2024-05-01 10:00:00', FALSE),
  ('m2', 'c1', 'look', 'user', '2024-05-01 10:00:01', '2024-05-01 10:00:01', TRUE);
INSERT INTO images (id, conversation_id, message_id, filename, file_path, file_size, mime_type, content_hash,
  created_at) VALUES ('i1', 'c1', 'm2', 'cat.png', 'ab/cat.png', 5, 'image/png', 'ab', '2024-05-01 10:00:01');
INSERT INTO stream_sessions (id, conversation_id, model, status, started_at, updated_at, partial_response, token_count,
  created_at) VALUES
  ('s-old', 'c1', 'llama3', 'ACTIVE', '2024-05-01 10:00:00', '2024-05-01 10:00:02', 'half', 1, '2024-05-01 10:00:00'),
  ('s-new', 'c1', 'llama3', 'ACTIVE', '2024-05-01 10:00:05', '2024-05-01 10:00:09', 'hal', 1, '2024-05-01 10:00:00'),
  ('s-done', 'c2', 'llama3', 'COMPLETED', '2024-04-01 08:00:00', '2024-04-01 08:00:09', 'x', 1, '2024-05-01 10:00:00');
"""


@dataclass
class Empty:
    """A database without tables, and ways to reach it that are not the product's."""

    url: str
    execute: Callable[[str], None]
    rows: Callable[[str], list[tuple[Any, ...]]]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Empty]:
    if request.param == "sqlite":
        file = tmp_path / "a folder" / "store.db"

        def execute(sql: str) -> None:
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(f"BEGIN; {sql}; COMMIT;")

        def rows(sql: str) -> list[tuple[Any, ...]]:
            with closing(sqlite3.connect(file)) as connection:
                return connection.execute(sql).fetchall()

        yield Empty(f"sqlite+aiosqlite:///{file}", execute, rows)
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"empty_{new_id()}"
    url = server.create(name)
    yield Empty(url, lambda sql: server.execute(name, sql), lambda sql: server.rows(name, sql))
    server.drop(name)


def contents(empty: Empty) -> dict[str, list[tuple[Any, ...]]]:
    kept = {
        "conversations": "id, tab_name, llm_model, is_private, password_hash, created_at, updated_at",
        "messages": "id, conversation_id, text, sender, timestamp, has_images",
        "images": "id, conversation_id, message_id, filename, file_path, file_size, mime_type, content_hash",
        "stream_sessions": "id, conversation_id, model, started_at, token_count",
    }
    return {table: empty.rows(f"SELECT {columns} FROM {table} ORDER BY id") for table, columns in kept.items()}


def test_up_down_and_up_again_keeps_the_data(empty: Empty) -> None:
    migrate.upgrade(empty.url, "0001")
    empty.execute(ROWS)
    migrate.upgrade(empty.url)
    before = contents(empty)
    assert len(before["messages"]) == 2
    for _ in range(2):
        assert migrate.current(empty.url) == migrate.head()
        assert empty.rows("SELECT DISTINCT provider FROM stream_sessions") == [("ollama",)]
        assert empty.rows("SELECT id FROM stream_sessions WHERE status = 'ACTIVE'") == [("s-new",)]
        migrate.downgrade(empty.url, "0001")
        assert migrate.current(empty.url) == "0001"
        assert contents(empty) == before
        migrate.upgrade(empty.url)
        assert contents(empty) == before
    migrate.downgrade(empty.url, "base")
    migrate.upgrade(empty.url)


async def test_a_reply_that_runs_during_a_downgrade_keeps_what_its_log_had(empty: Empty) -> None:
    await migrate.upgrade_async(empty.url)
    store = await Store.open(empty.url)
    await store.create_conversation("c", "Tab")
    await store.begin_reply(NewSession("s", "c", "m", "p", owner="me", wanted=Wanted()), text="question")
    entries = [Entry(Numbered(n, Token(f"{n} ", 2 * n - 2)), Origin("m", "p", n)) for n in (1, 2, 3)]
    await store.write_log("me", ["s"], {"s": rows_of(entries, 0, 1)})
    await store.close()
    await asyncio.to_thread(migrate.downgrade, empty.url, "0003")
    assert empty.rows("SELECT partial_response FROM stream_sessions") == [("1 2 3 ",)]
    await migrate.upgrade_async(empty.url)
    store = await Store.open(empty.url)
    session = await store.get_session("s")
    assert (session.status, session.partial_response, session.epoch) == (SessionStatus.ACTIVE, "1 2 3 ", 1)
    await store.close()


async def test_the_migrations_make_exactly_the_tables_that_the_queries_use(empty: Empty) -> None:
    await migrate.upgrade_async(empty.url)

    def compare(connection: Connection) -> None:
        inspector = inspect(connection)
        assert set(inspector.get_table_names()) == {*metadata.tables, "alembic_version"}
        for table in metadata.sorted_tables:
            found = {column["name"]: column["nullable"] for column in inspector.get_columns(table.name)}
            assert found == {column.name: bool(column.nullable) for column in table.columns}
            indexes = {(index["name"], tuple(index["column_names"])) for index in inspector.get_indexes(table.name)}
            assert indexes == {(index.name, tuple(column.name for column in index.columns)) for index in table.indexes}
            key = inspector.get_pk_constraint(table.name)["constrained_columns"]
            assert key == [column.name for column in table.primary_key]
            keys = inspector.get_foreign_keys(table.name)
            cascades = {key["constrained_columns"][0]: key["referred_table"] for key in keys}
            assert cascades == {key.parent.name: key.column.table.name for key in table.foreign_keys}
            assert all(key["options"] == {"ondelete": "CASCADE"} for key in keys)

    engine = make_engine(parse_url(empty.url))
    async with engine.begin() as connection:
        await connection.run_sync(compare)
    await engine.dispose()


def test_several_processes_migrate_at_once_and_all_succeed(empty: Empty) -> None:
    code = "import sys; from serve_app.store import migrate; migrate.upgrade(sys.argv[1])"
    command = [sys.executable, "-c", code, empty.url]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert {(process.communicate(timeout=120)[1], process.returncode) for process in both} == {("", 0)}
    assert migrate.current(empty.url) == migrate.head()


async def test_a_store_that_waits_for_its_migration_says_so_until_it_comes(empty: Empty) -> None:
    await migrate.upgrade_async(empty.url, "0001")
    with pytest.raises(InvalidConfig, match="revision 0001"):
        await Store.open(empty.url)
    store = Store.attach(empty.url)
    wanted = rf"revision 0001, and this release needs {migrate.head()}. Run: rotunda db upgrade"
    for attempt in (store.ping, lambda: store.create_conversation("c", "Tab")):
        with pytest.raises(ProviderUnavailable, match=wanted):
            await attempt()
    await migrate.upgrade_async(empty.url)
    await store.ping()
    await store.create_conversation("c", "Tab")
    await store.close()


async def test_a_postgresql_that_is_away_is_unavailable_and_heals(postgres: Postgres) -> None:
    store = Store.attach(postgres.url("not_yet"))
    with pytest.raises(ProviderUnavailable):
        await store.ping()
    url = postgres.create("not_yet")
    await migrate.upgrade_async(url)
    await store.ping()
    await store.close()
    postgres.drop("not_yet")


def test_sqlite_on_several_nodes_is_refused() -> None:
    for url in ("sqlite+aiosqlite:///x.db", "sqlite:///x.db"):
        check_nodes(url, 1)
        with pytest.raises(InvalidConfig, match=r"2 nodes.*PostgreSQL"):
            check_nodes(url, 2)
    check_nodes("postgresql+asyncpg://h/d", 2)
