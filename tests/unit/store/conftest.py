"""A migrated SQLite store per test; the migration itself runs once."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve_app.domain.conversation import Conversation
from serve_app.store import NewSession, Store, migrate, new_id


def url_of(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file}"


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "template.db"
    migrate.upgrade(url_of(file))
    return file


@pytest.fixture
def url(migrated_file: Path, tmp_path: Path) -> str:
    file = tmp_path / "store.db"
    shutil.copy(migrated_file, file)
    return url_of(file)


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
