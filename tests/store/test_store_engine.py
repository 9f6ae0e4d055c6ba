"""The engine below the store: SQLite's settings, several processes, cancelled callers, failures in plain words."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.domain.conversation import Conversation
from serve_app.domain.errors import Internal, InvalidInput, NotFound, ProviderUnavailable
from serve_app.store import NewSession, Store
from serve_app.store import engine as engine_module
from serve_app.store.engine import parse_url
from serve_app.store.records import NewConversation
from serve_app.store.sqlite import Writer
from serve_app.store.tables import conversations, database_ms, messages

WRITER = Path(__file__).with_name("writer_process.py")


async def test_sqlite_is_set_up_for_several_processes(on_sqlite: str) -> None:
    store = await Store.open(on_sqlite)
    async with store._db.read() as connection:
        found = {
            name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 10_000}
    await store.ping()
    await store.close()


async def test_reads_go_on_while_a_transaction_writes(store: Store, conversation: Conversation) -> None:
    async with store._db.write() as connection:
        await connection.exec_driver_sql("UPDATE conversations SET tab_name = 'changed'")
        async with asyncio.timeout(2):
            assert (await store.get_conversation(conversation.id)).tab_name == conversation.tab_name
    assert (await store.get_conversation(conversation.id)).tab_name == "changed"


def test_two_processes_write_one_database(url: str) -> None:
    """Both add messages to one conversation and race to begin the same replies; nothing is lost, refused or doubled."""
    writers = [
        subprocess.Popen(
            [sys.executable, str(WRITER), url, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [json.loads(process.communicate(timeout=60)[0]) for process in writers]
    counts = Counter(outcome for process in outcomes for outcome in process["outcomes"])
    assert counts == {"added": 2 * 60, "begun": 30, "ConversationBusy": 30}
    keys = {process["signing_key"] for process in outcomes}
    assert len(keys) == 1

    async def check() -> None:
        store = await Store.open(url)
        try:
            kept = await store.list_messages("shared")
            for name in ("one", "two"):
                assert [m.text for m in kept if m.text.startswith(name)] == [f"{name} {n}" for n in range(60)]
            async with store._db.read() as connection:
                last = await connection.scalar(select(func.max(messages.c.seq)))
            assert last == len(kept) == 120
        finally:
            await store.close()

    asyncio.run(check())


async def test_a_cancelled_caller_leaves_whole_transactions(store: Store, conversation: Conversation) -> None:
    callers = [asyncio.create_task(store.add_message(conversation.id, str(n), "user")) for n in range(30)]
    for caller in callers:
        await asyncio.sleep(0)
        caller.cancel()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert any(isinstance(result, asyncio.CancelledError) for result in results)
    await asyncio.gather(*store._db._running)
    await store.add_message(conversation.id, "last", "user")
    listed = [message.text for message in await store.list_messages(conversation.id)]
    assert len(set(listed)) == len(listed) > 1
    assert listed[-1] == "last"
    assert store._db._running == set()


def new(name: str) -> tuple[NewSession, NewConversation]:
    return NewSession(f"s-{name}", f"c-{name}", "m", "p", "me"), NewConversation(f"c-{name}", "Tab")


async def begin(store: Store, name: str) -> str:
    session, conversation = new(name)
    return (await store.begin_reply(session, text=name, conversation=conversation)).session.id


async def test_replies_that_begin_together_share_one_visit_to_sqlite(
    on_sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await Store.open(on_sqlite)
    visits: list[int] = []
    original = Writer._carry_out

    def counted(self: Writer, waiting: Any, loop: Any) -> None:
        visits.append(len(waiting))
        original(self, waiting, loop)

    monkeypatch.setattr(Writer, "_carry_out", counted)
    begun = await asyncio.gather(*(begin(store, str(number)) for number in range(40)))
    assert begun == [f"s-{number}" for number in range(40)]
    assert sum(visits) == 40 and len(visits) <= 2
    await store.close()


async def test_of_replies_that_begin_together_one_that_cannot_disturbs_no_other(store: Store) -> None:
    await begin(store, "known")
    names = ["a", "known", "b", "known", "c"]
    outcomes = await asyncio.gather(*(begin(store, name) for name in names), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [str, InvalidInput, str, InvalidInput, str]
    kept = {name: [message.text for message in await store.list_messages(f"c-{name}")] for name in names}
    assert kept == {name: [name] for name in names}


async def test_what_every_reply_writes_waits_for_a_transaction_of_the_same_process(
    on_sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SQLITE_BUSY_MS", 50)
    store = await Store.open(on_sqlite)
    async with store._db.write() as connection:
        await connection.exec_driver_sql("SELECT 1")
        begun = asyncio.create_task(begin(store, "a"))
        await asyncio.wait([begun], timeout=0.3)
        assert not begun.done()
    assert await begun == "s-a"
    await store.close()


async def test_a_reply_that_finds_the_file_locked_may_begin_again(
    on_sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SQLITE_BUSY_MS", 50)
    holder, store = await Store.open(on_sqlite), await Store.open(on_sqlite)
    async with holder._db.write() as connection:
        await connection.exec_driver_sql("SELECT 1")
        outcomes = await asyncio.gather(begin(store, "a"), begin(store, "b"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ProviderUnavailable, ProviderUnavailable]
    assert await asyncio.gather(begin(store, "a"), begin(store, "b")) == ["s-a", "s-b"]
    await holder.close()
    await store.close()


async def test_a_transaction_in_one_visit_may_wait_for_nothing_else(on_sqlite: str) -> None:
    store = await Store.open(on_sqlite)

    async def waits(connection: AsyncConnection) -> None:
        await connection.execute(insert(conversations).values(NewConversation("c", "Tab").values()))
        await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="something else"):
        await store._db.write_at_once(waits)
    with pytest.raises(NotFound):
        await store.get_conversation("c")
    assert await begin(store, "a") == "s-a"
    await store.close()


async def test_closing_waits_for_what_cancelled_callers_left(url: str) -> None:
    store = await Store.open(url)
    await store.create_conversation("c", "Tab")
    caller = asyncio.create_task(store.add_message("c", "hello", "user"))
    await asyncio.sleep(0)
    caller.cancel()
    await store.close()
    again = await Store.open(url)
    assert [message.text for message in await again.list_messages("c")] == ["hello"]
    await again.close()


async def test_a_locked_database_is_unavailable_and_worth_another_try(
    on_sqlite: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "SQLITE_BUSY_MS", 50)
    holder, waiter = await Store.open(on_sqlite), await Store.open(on_sqlite)
    try:
        async with holder._db.write() as connection:
            await connection.exec_driver_sql("SELECT 1")
            started = time.monotonic()
            with pytest.raises(ProviderUnavailable, match="conversation store cannot be reached") as failure:
                await waiter.create_conversation("c", "Tab", system_prompt="between us")
            assert time.monotonic() - started < 5
        assert failure.value.retryable
        await waiter.create_conversation("c", "Tab")
    finally:
        await holder.close()
        await waiter.close()
    assert "database is locked" in caplog.text
    assert "between us" not in caplog.text


async def test_a_fault_of_ours_is_masked_and_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    content = " ".join(["between", "us"])
    with pytest.raises(Internal) as failure:
        async with store._db.read() as connection:
            await connection.execute(text("SELECT secret FROM nowhere WHERE x = :x"), {"x": content})
    assert "nowhere" not in failure.value.message
    assert "FROM nowhere" in caplog.text
    assert content not in caplog.text


def test_credentials_are_in_no_repr() -> None:
    url = parse_url("postgres://me:secret@host/db")
    assert url.drivername == "postgresql+asyncpg"
    assert "secret" not in repr(url)


def test_the_databases_clock_is_asked_in_each_dialect() -> None:
    assert "julianday" in str(select(database_ms()).compile(dialect=sqlite.dialect()))
    assert "clock_timestamp()" in str(select(database_ms()).compile(dialect=postgresql.dialect()))
