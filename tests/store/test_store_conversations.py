"""Conversations, their messages and the images of these."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event

from serve_app.domain.conversation import Conversation, MessageStatus
from serve_app.domain.errors import InvalidInput, NotFound
from serve_app.store import Cursor, NewImage, NewSession, Store

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def image(path: str, expires_at: datetime | None = None) -> NewImage:
    return NewImage(f"holiday {path}", path, 10, "image/png", f"hash of {path}", expires_at)


async def test_a_conversation_is_kept_as_given(store: Store) -> None:
    made = await store.create_conversation("a", "Tab", "m", "hash", "Be brief.")
    assert made == await store.get_conversation("a")
    assert (made.tab_name, made.llm_model, made.password_hash, made.system_prompt) == ("Tab", "m", "hash", "Be brief.")
    assert made.is_private
    assert made.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - made.created_at) < timedelta(seconds=10)


async def test_an_id_is_taken_once(store: Store, conversation: Conversation) -> None:
    with pytest.raises(InvalidInput, match="already exists"):
        await store.create_conversation(conversation.id, "Tab")
    assert await store.get_conversation(conversation.id) == conversation


async def test_what_is_not_there_is_not_found(store: Store, conversation: Conversation) -> None:
    for missing in (
        store.get_conversation("x"),
        store.delete_conversation("x"),
        store.set_password_hash("x", "h"),
        store.update_conversation("x"),
        store.add_message("x", "hello", "user"),
        store.get_message("x"),
        store.list_messages(conversation.id, after="x"),
        store.delete_messages_after(conversation.id, "x"),
        store.get_image("x"),
    ):
        with pytest.raises(NotFound):
            await missing


async def test_conversations_come_by_activity_page_by_page(store: Store) -> None:
    for id in "abcde":
        await store.create_conversation(id, id)
    await store.create_conversation("hidden", "hidden", password_hash="h")
    await store.add_message("b", "again", "user")
    pages: list[list[str]] = []
    cursor: Cursor | None = None
    while page := await store.list_conversations(limit=2, before=cursor):
        pages.append([one.id for one in page])
        cursor = Cursor.decode(Cursor.of(page[-1]).encode())
    assert pages == [["b", "e"], ["d", "c"], ["a"]]
    assert [one.id for one in await store.list_conversations(include_private=True)][:2] == ["b", "hidden"]
    assert (await store.count_conversations(), await store.count_conversations(include_private=True)) == (5, 6)


async def test_pages_are_whole_when_many_were_active_at_one_moment(store: Store, url: str) -> None:
    for id in "abcde":
        await store.create_conversation(id, id)
    async with store._db.write() as connection:
        await connection.exec_driver_sql("UPDATE conversations SET updated_at = '2026-01-01 00:00:00.000000'")
    first = await store.list_conversations(limit=3)
    rest = await store.list_conversations(limit=3, before=Cursor.of(first[-1]))
    assert [one.id for one in first + rest] == ["e", "d", "c", "b", "a"]


@pytest.mark.parametrize("text", ["", "x", "é", "bnVsbA==", "WzEsMl0=", "WyJ4IiwgImEiXQ=="])
def test_a_cursor_of_somebody_elses_making_is_invalid(text: str) -> None:
    with pytest.raises(InvalidInput, match="cursor"):
        Cursor.decode(text)


async def test_changing_a_password_or_a_name_is_no_activity(store: Store, conversation: Conversation) -> None:
    await store.set_password_hash(conversation.id, "h")
    await store.update_conversation(conversation.id, tab_name="New", system_prompt="Be kind.")
    changed = await store.get_conversation(conversation.id)
    assert (changed.is_private, changed.password_hash) == (True, "h")
    assert (changed.tab_name, changed.system_prompt, changed.llm_model) == ("New", "Be kind.", conversation.llm_model)
    assert changed.updated_at == conversation.updated_at
    await store.set_password_hash(conversation.id, None)
    assert not (await store.get_conversation(conversation.id)).is_private


async def test_a_message_is_kept_as_given_and_is_activity(store: Store, conversation: Conversation) -> None:
    kept = await store.add_message(
        conversation.id, "half", "llm", id="m1", model="m", provider="p", status=MessageStatus.TERMINATED
    )
    assert kept == await store.get_message("m1")
    assert (kept.model, kept.provider, kept.status, kept.sender) == ("m", "p", MessageStatus.TERMINATED, "llm")
    after = await store.get_conversation(conversation.id)
    assert after.updated_at > conversation.updated_at
    assert after.message_count == 1
    with pytest.raises(InvalidInput, match="already exists"):
        await store.add_message(conversation.id, "twice", "user", id="m1")
    assert await store.message_counts([conversation.id, "x"]) == {conversation.id: 1, "x": 0}


async def test_what_no_database_can_hold_does_not_lose_the_message(store: Store, conversation: Conversation) -> None:
    kept = await store.add_message(conversation.id, "a\x00b\ud800c \U0001f600", "user")
    assert kept.text == "a\ufffdb\ufffdc \U0001f600"
    with pytest.raises(NotFound):
        await store.get_conversation("\ud800")


async def test_order_does_not_depend_on_the_clock(
    store: Store, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([NOW, NOW, NOW - timedelta(hours=1), NOW])
    last = NOW
    monkeypatch.setattr("serve_app.store.messages.utc_now", lambda: next(times, last))
    for text in "abcd":
        await store.add_message(conversation.id, text, "user")
    assert [message.text for message in await store.list_messages(conversation.id)] == list("abcd")
    assert [message.text for message in await store.last_messages(conversation.id, 2)] == ["c", "d"]


async def test_messages_written_at_once_have_one_order(store: Store, conversation: Conversation) -> None:
    await asyncio.gather(*(store.add_message(conversation.id, str(i), "user") for i in range(20)))
    listed = await store.list_messages(conversation.id)
    assert len(listed) == 20
    assert listed == await store.list_messages(conversation.id)


async def test_messages_page_both_ways(store: Store, conversation: Conversation) -> None:
    for text in "abcdef":
        await store.add_message(conversation.id, text, "user", id=text)

    async def page(**bounds: str | int) -> str:
        return "".join(message.id for message in await store.list_messages(conversation.id, **bounds))  # type: ignore[arg-type]

    assert await page() == "abcdef"
    assert await page(limit=2) == "ab"
    assert await page(limit=2, after="b") == "cd"
    assert await page(after="f") == ""
    assert await page(limit=2, before="e") == "cd"
    assert await page(before="c") == "ab"
    assert await page(after="a", before="d") == "bc"
    assert await store.list_messages("nowhere") == []


async def test_messages_of_many_conversations_come_at_once(store: Store, conversation: Conversation) -> None:
    await store.create_conversation("other", "Other")
    for text in "abc":
        await store.add_message(conversation.id, text, "user", images=[image(text)])
        await store.add_message("other", text.upper(), "user")
    found = await store.messages_of([conversation.id, "other", "nowhere"])
    assert found[conversation.id] == await store.list_messages(conversation.id)
    assert found["other"] == await store.list_messages("other")
    assert found["nowhere"] == []
    few = await store.messages_of([conversation.id, "other"], limit=2)
    assert [[message.text for message in some] for some in few.values()] == [["a", "b"], ["A", "B"]]
    newest = await store.messages_of([conversation.id, "other", "nowhere"], limit=2, newest=True)
    assert [[message.text for message in some] for some in newest.values()] == [["b", "c"], ["B", "C"], []]
    for limit in (3, 4):
        assert await store.messages_of([conversation.id, "other", "nowhere"], limit) == found
        assert await store.messages_of([conversation.id, "other", "nowhere"], limit, newest=True) == found


async def test_images_come_with_their_messages_in_one_more_query(store: Store, conversation: Conversation) -> None:
    for number in range(5):
        await store.add_message(conversation.id, "look", "user", images=[image(f"{number}b"), image(f"{number}a")])
    statements: list[str] = []
    event.listen(store._db._engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    listed = await store.list_messages(conversation.id)
    assert [[one.file_path for one in message.images] for message in listed] == [[f"{n}b", f"{n}a"] for n in range(5)]
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 2
    assert await store.get_image(listed[0].images[0].id) == listed[0].images[0]


async def test_deleting_a_conversation_takes_everything_but_shared_files(
    store: Store, conversation: Conversation
) -> None:
    await store.create_conversation("other", "Other")
    await store.add_message("other", "look", "user", images=[image("shared")])
    kept = await store.add_message(
        conversation.id, "look", "user", images=[image("shared"), image("own"), image("own")]
    )
    session = await store.open_session(NewSession("s", conversation.id, "m", "p", "me"))
    await store.allow_password_attempt(conversation.id, "1.2.3.4")
    assert await store.delete_conversation(conversation.id) == ["own"]
    for gone in (
        store.get_conversation(conversation.id),
        store.get_message(kept.id),
        store.get_image(kept.images[0].id),
        store.get_session(session.id),
    ):
        with pytest.raises(NotFound):
            await gone
    assert await store.delete_conversation("other") == ["shared"]
    async with store._db.read() as connection:
        for table in ("conversations", "messages", "images", "stream_sessions", "password_attempts"):
            assert (await connection.exec_driver_sql(f"SELECT count(*) FROM {table}")).scalar_one() == 0


async def test_the_database_itself_cascades(store: Store, conversation: Conversation) -> None:
    await store.add_message(conversation.id, "look", "user", images=[image("a")])
    async with store._db.write() as connection:
        await connection.exec_driver_sql("DELETE FROM conversations")
        assert (await connection.exec_driver_sql("SELECT count(*) FROM images")).scalar_one() == 0


async def test_deleting_after_a_message_keeps_that_message(store: Store, conversation: Conversation) -> None:
    for text in "abcd":
        await store.add_message(conversation.id, text, "user", id=text, images=[image("all"), image(f"only {text}")])
    assert await store.delete_messages_after(conversation.id, "b") == (2, ["only c", "only d"])
    assert [message.id for message in await store.list_messages(conversation.id)] == ["a", "b"]
    assert await store.delete_messages_after(conversation.id, "b") == (0, [])
    await store.add_message(conversation.id, "e", "user", id="e")
    assert [message.id for message in await store.list_messages(conversation.id)] == ["a", "b", "e"]


async def test_a_message_of_another_conversation_is_no_place_to_delete_from(store: Store) -> None:
    for id in "ab":
        await store.create_conversation(id, id)
        await store.add_message(id, "hello", "user", id=f"in {id}")
    with pytest.raises(NotFound):
        await store.delete_messages_after("a", "in b")
    with pytest.raises(NotFound):
        await store.list_messages("a", before="in b")


async def test_expired_images_leave_their_messages(store: Store, conversation: Conversation) -> None:
    soon, later = NOW + timedelta(days=1), NOW + timedelta(days=2)
    await store.add_message(conversation.id, "a", "user", images=[image("x", soon), image("y", soon)])
    await store.add_message(conversation.id, "b", "user", images=[image("y", later), image("z")])
    assert await store.expired_images(NOW) == []
    assert [one.file_path for one in await store.expired_images(soon)] == ["x", "y"]
    assert await store.expire_images(soon) == ["x"]
    assert await store.expire_images(soon) == []
    listed = await store.list_messages(conversation.id)
    assert [[one.file_path for one in message.images] for message in listed] == [[], ["y", "z"]]
    assert await store.expired_images(soon) == []
    assert len(await store.images_referencing("y")) == 1
    assert await store.expire_images(later) == ["y"]
    assert await store.images_referencing("y") == []
