"""Migrations: both ways with data in place, several processes at once, databases of the chat service."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve_app.domain.conversation import SessionStatus
from serve_app.domain.errors import ConversationBusy, InvalidConfig
from serve_app.store import NewSession, Store, migrate

TABLES = Path(__file__).with_name("chat_service_tables.sql").read_text()
ROWS = Path(__file__).with_name("chat_service_rows.sql").read_text()


def url_of(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file}"


def script(file: Path, sql: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(f"BEGIN; {sql}; COMMIT;")


def rows(file: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture
def chat_service_file(tmp_path: Path) -> Path:
    file = tmp_path / "chat.db"
    script(file, TABLES + ROWS)
    return file


def test_upgrade_makes_the_folder_and_the_file_and_reaches_head(tmp_path: Path) -> None:
    url = url_of(tmp_path / "a folder" / "50%" / "rotunda.db")
    assert migrate.current(url) is None
    assert not (tmp_path / "a folder").exists()
    migrate.upgrade(url)
    assert migrate.current(url) == migrate.head() == "0004"
    migrate.upgrade(url)
    assert migrate.current(url) == "0004"


def test_down_and_up_again_keeps_the_data(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    migrate.upgrade(url_of(file), "0001")
    script(file, ROWS)
    before = {table: rows(file, f"SELECT id FROM {table} ORDER BY id") for table in ("messages", "images")}
    for _ in range(2):
        migrate.upgrade(url_of(file))
        assert rows(file, "SELECT DISTINCT provider FROM stream_sessions") == [("ollama",)]
        assert rows(file, "SELECT DISTINCT status FROM messages") == [("complete",)]
        assert {table: rows(file, f"SELECT id FROM {table} ORDER BY id") for table in before} == before
        assert rows(file, "PRAGMA foreign_key_check") == []
        with pytest.raises(sqlite3.IntegrityError, match=r"NOT NULL.*provider"):
            script(file, "UPDATE stream_sessions SET provider = NULL")
        migrate.downgrade(url_of(file), "0001")
        assert migrate.current(url_of(file)) == "0001"
        assert "provider" not in [row[1] for row in rows(file, "PRAGMA table_info(stream_sessions)")]
        assert {table: rows(file, f"SELECT id FROM {table} ORDER BY id") for table in before} == before
    migrate.downgrade(url_of(file), "base")
    assert rows(file, "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'alembic_version'") == []


def test_a_database_of_the_chat_service_is_recognised(chat_service_file: Path) -> None:
    assert migrate.current(url_of(chat_service_file)) is None
    migrate.upgrade(url_of(chat_service_file))
    assert migrate.current(url_of(chat_service_file)) == migrate.head()
    assert rows(chat_service_file, "SELECT DISTINCT provider FROM stream_sessions") == [("ollama",)]
    assert rows(chat_service_file, "SELECT colour FROM conversations WHERE id = 'c1'") == [("blue",)]


async def test_what_the_chat_service_kept_reads_as_ours(chat_service_file: Path) -> None:
    await migrate.upgrade_async(url_of(chat_service_file))
    store = await Store.open(url_of(chat_service_file))
    try:
        assert [one.id for one in await store.list_conversations(include_private=True)] == ["c1", "c2"]
        first = await store.get_conversation("c1")
        assert (first.created_at, first.is_private) == (datetime(2024, 5, 1, 10, 0, tzinfo=UTC), False)
        assert (await store.get_conversation("c2")).updated_at == datetime(2024, 4, 1, 8, 0, tzinfo=UTC)
        # Written within one second: neither time nor id says which came first.
        assert [message.id for message in await store.list_messages("c1")] == ["z-first", "a-second", "third"]
        assert (await store.get_message("third")).images[0].filename == "cat.png"
        await store.add_message("c1", "and then", "user")
        assert [message.text for message in await store.last_messages("c1", 1)] == ["and then"]
    finally:
        await store.close()


async def test_replies_that_the_chat_service_left_open_do_not_block_their_conversation(chat_service_file: Path) -> None:
    await migrate.upgrade_async(url_of(chat_service_file))
    store = await Store.open(url_of(chat_service_file))
    try:
        older = await store.get_session("s-old")
        assert (older.status, older.error_message) == (SessionStatus.ERROR, "The reply was never finished.")
        assert (await store.get_session("s-new")).status is SessionStatus.ACTIVE
        session = await store.open_session(NewSession("s-next", "c1", "m", "p", owner="me"))
        assert (await store.get_session("s-new")).status is SessionStatus.ERROR
        assert (await store.last_messages("c1", 1))[0].text == "half a rep"
        with pytest.raises(ConversationBusy) as busy:
            await store.open_session(NewSession("s-last", "c1", "m", "p", owner="me"))
        assert busy.value.details == {"sessionId": session.id}
    finally:
        await store.close()


def test_another_database_with_such_tables_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    script(file, "CREATE TABLE messages (id TEXT PRIMARY KEY, body TEXT)")
    with pytest.raises(InvalidConfig, match=r"lacks conversations, images, messages\.conversation_id"):
        migrate.upgrade(url_of(file))
    assert rows(file, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("messages",)]


def test_a_migration_that_fails_leaves_no_trace(chat_service_file: Path) -> None:
    script(chat_service_file, "UPDATE messages SET timestamp = 'yesterday' WHERE id = 'third'")
    with pytest.raises(InvalidConfig, match=r"messages\.timestamp"):
        migrate.upgrade(url_of(chat_service_file))
    assert migrate.current(url_of(chat_service_file)) is None
    script(chat_service_file, "UPDATE messages SET timestamp = '2024-05-01' WHERE id = 'third'")
    migrate.upgrade(url_of(chat_service_file))


def test_a_database_of_a_newer_release_is_refused(migrated_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "newer.db"
    file.write_bytes(migrated_file.read_bytes())
    script(file, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(InvalidConfig, match="newer release"):
        migrate.upgrade(url_of(file))


async def test_open_names_both_revisions_and_the_command(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    with pytest.raises(InvalidConfig, match=r"revision none, and this release needs 0004. Run: rotunda db upgrade"):
        await Store.open(url_of(file))
    assert not file.exists()
    await migrate.upgrade_async(url_of(file), "0001")
    with pytest.raises(InvalidConfig, match=r"revision 0001, and this release needs 0004"):
        await Store.open(url_of(file))


@pytest.mark.parametrize(
    "url", ["not a url", "mysql://host/db", "sqlite+aiosqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory"]
)
async def test_a_database_that_replicas_cannot_share_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfig, match="DATABASE_URL"):
        await Store.open(url)
