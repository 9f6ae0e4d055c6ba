"""A migrated store per test, on both databases; each migration itself runs once."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from serve_app.domain.conversation import Conversation
from serve_app.store import NewSession, Store, migrate, new_id
from serve_app.store.tables import metadata
from tests.postgres import Postgres


def url_of(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file}"


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "template.db"
    migrate.upgrade(url_of(file))
    return file


@pytest.fixture(scope="session")
def migrated_database(postgres: Postgres) -> str:
    """The URL of a PostgreSQL database that tests use in turn."""
    url = postgres.create("store")
    migrate.upgrade(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated database without rows."""
    if request.param == "sqlite":
        file = tmp_path / "store.db"
        shutil.copy(request.getfixturevalue("migrated_file"), file)
        yield url_of(file)
        return
    server: Postgres = request.getfixturevalue("postgres")
    yield request.getfixturevalue("migrated_database")
    server.execute("store", f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")


@pytest.fixture
def on_sqlite(migrated_file: Path, tmp_path: Path) -> str:
    """The URL of a migrated SQLite database, for what only SQLite does."""
    shutil.copy(migrated_file, tmp_path / "only.db")
    return url_of(tmp_path / "only.db")


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = await Store.open(url)
    yield store
    await store.close()


@pytest.fixture
async def conversation(store: Store) -> Conversation:
    return await store.create_conversation("talk", "Talk", "tiny-chat")


@pytest.fixture
def new_session(conversation: Conversation) -> NewSession:
    return NewSession(new_id(), conversation.id, "tiny-chat", "huggingface", owner="ingress-1")
