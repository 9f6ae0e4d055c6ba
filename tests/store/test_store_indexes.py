"""Every query finds its rows through an index, however large the tables have become."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import event

from serve_app.domain.conversation import SessionStatus
from serve_app.domain.stream_log import LogRow
from serve_app.domain.wanted import Wanted
from serve_app.store import Cursor, NewImage, NewSession, Store

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def use_everything(store: Store) -> None:
    await store.create_conversation("c", "Tab")
    await store.list_conversations(before=Cursor(NOW, "x"))
    await store.list_conversations(before=Cursor(NOW, "x"), include_private=True)
    await store.message_counts(["c"])
    await store.update_conversation("c", tab_name="New")
    await store.add_message("c", "x", "user", id="m", images=[NewImage("a", "a", 1, "image/png", "h", NOW)])
    await store.list_messages("c", after="m", limit=3)
    await store.list_messages("c", before="m", limit=3)
    await store.last_messages("c", 4)
    await store.messages_of(["c"])
    await store.messages_of(["c"], 3)
    await store.messages_of(["c"], 3, newest=True)
    await store.get_message("m")
    await store.images_referencing("a")
    await store.expired_images(NOW)
    await store.expire_images(NOW)
    await use_sessions(store)
    await store.signing_key()
    await store.allow_password_attempt("c", "::1")
    await store.delete_messages_after("c", "m")
    await store.delete_conversation("c")


async def use_sessions(store: Store) -> None:
    await store.begin_reply(NewSession("s", "c", "m", "p", "me", wanted=Wanted(), idempotency_key="k"), text="x")
    await store.list_sessions("c")
    await store.list_sessions(status=SessionStatus.COMPLETED)
    await store.list_sessions("c", SessionStatus.ACTIVE)
    await store.list_sessions(before=Cursor(NOW, "x"), public_only=True)
    await store.list_sessions("c", SessionStatus.ACTIVE, before=Cursor(NOW, "x"))
    await store.session_by_key("k")
    row = LogRow(1, 1, 0, "token", "x", (1,))
    await store.write_log("me", ["s"], {"s": [row]})
    await store.write_log("me", ["s"], {}, renew_s=5)
    await store.get_session("s")
    await store.read_log({"s": 0})
    await store.request_termination("s", "x")
    await store.release_session("s", 1, [])
    await store.abandoned_sessions()
    await store.adopt_session("s", "me")
    await store.close_abandoned()
    await store.finish_session("s", status=SessionStatus.COMPLETED, text="t")
    await store.prune_log(datetime.now(UTC) + timedelta(days=1))


async def test_no_query_scans_a_table(store: Store) -> None:
    seen: dict[str, Any] = {}

    def remember(connection: Any, cursor: Any, sql: str, values: Any, context: Any, many: bool) -> None:
        if sql.startswith(("SELECT", "UPDATE", "DELETE", "WITH")) and sql != "SELECT 1":
            seen.setdefault(sql, values[0] if many else values)

    writer = store._db._at_once
    engines = [store._db._engine.sync_engine, *([writer._engine] if writer else [])]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", remember)
    await use_everything(store)
    for engine in engines:
        event.remove(engine, "before_cursor_execute", remember)
    assert len(seen) > 50
    async with store._db.write() as connection:  # one transaction, which the setting is for
        on_sqlite = connection.dialect.name == "sqlite"
        if not on_sqlite:
            # The tables are all but empty: what matters is whether there is another way than reading them whole.
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for sql, values in seen.items():
            plan = await connection.exec_driver_sql(f"EXPLAIN {'QUERY PLAN' if on_sqlite else ''} {sql}", values)
            steps = [str(row.detail if on_sqlite else row[0]).strip() for row in plan]
            assert [step for step in steps if step.startswith("SCAN") or "Seq Scan" in step] == [], sql
