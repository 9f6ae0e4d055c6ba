"""Stream sessions: one at a time, owned, ended once, and never lost with their owner."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve_app.domain.conversation import MessageStatus, SessionStatus, TerminationReason
from serve_app.domain.errors import ConversationBusy, InvalidInput, NotFound
from serve_app.domain.events import Numbered, Token
from serve_app.domain.generation import Timing, Usage
from serve_app.domain.stream_log import Entry, Origin, rows_of
from serve_app.store import Cursor, NewImage, NewSession, Store
from serve_app.store.conversations import touch
from serve_app.store.messages import insert_message, new_message
from serve_app.store.records import AlreadyBegun, NewConversation, utc_now

USAGE = Usage(10, 3, 2)
TIMING = Timing(0.1, 0.2, 0.3, 0.4, 1.0)
PICTURE = NewImage("cat.png", "ab/cat.png", 3, "image/png", "ab")


async def test_a_reply_begins_with_its_message(store: Store, new_session: NewSession) -> None:
    new = replace(new_session, timeout_ms=30_000, trace_id="t" * 32)
    begun = await store.begin_reply(new, text="What is this?", images=[PICTURE], message_id="question")
    assert begun.message == await store.get_message("question")
    assert [one.filename for one in begun.message.images] == ["cat.png"]
    session = begun.session
    assert session == await store.get_session(new.id)
    assert (session.status, session.provider, session.owner) == (SessionStatus.ACTIVE, "huggingface", "ingress-1")
    assert (session.timeout_ms, session.trace_id, session.usage, session.timing) == (30_000, "t" * 32, None, None)


async def test_a_refused_reply_leaves_no_message(store: Store, new_session: NewSession) -> None:
    await store.begin_reply(new_session, text="one")
    with pytest.raises(ConversationBusy) as busy:
        await store.begin_reply(replace(new_session, id="second"), text="two", images=[PICTURE])
    assert busy.value.details == {"sessionId": new_session.id}
    assert [message.text for message in await store.list_messages(new_session.conversation_id)] == ["one"]
    assert await store.images_referencing(PICTURE.file_path) == []


async def test_a_message_whose_id_is_taken_leaves_no_session(store: Store, new_session: NewSession) -> None:
    await store.add_message(new_session.conversation_id, "one", "user", id="taken")
    with pytest.raises(InvalidInput, match="message"):
        await store.begin_reply(new_session, text="two", message_id="taken")
    with pytest.raises(NotFound):
        await store.get_session(new_session.id)


async def test_a_session_id_is_taken_once(store: Store, new_session: NewSession) -> None:
    await store.create_conversation("other", "Other")
    await store.open_session(new_session)
    with pytest.raises(InvalidInput, match="session"):
        await store.begin_reply(replace(new_session, conversation_id="other"), text="hello")
    assert await store.list_messages("other") == []
    with pytest.raises(NotFound):
        await store.open_session(replace(new_session, id="s", conversation_id="nowhere"))


async def test_of_many_replies_at_once_one_begins(store: Store, new_session: NewSession) -> None:
    attempts = [store.begin_reply(replace(new_session, id=f"s{n}"), text=f"{n}") for n in range(10)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    begun = [result for result in results if not isinstance(result, BaseException)]
    assert len(begun) == 1
    assert [type(result) for result in results].count(ConversationBusy) == 9
    assert len(await store.list_messages(new_session.conversation_id)) == 1


async def test_a_finished_reply_is_a_message(store: Store, new_session: NewSession) -> None:
    await store.begin_reply(new_session, text="question")
    done = await store.finish_session(
        new_session.id,
        status=SessionStatus.COMPLETED,
        text="answer",
        token_count=3,
        finish_reason="stop",
        usage=USAGE,
        timing=TIMING,
        model="other-model",
        provider="other",
    )
    assert done == await store.get_session(new_session.id)
    assert (done.status, done.partial_response, done.token_count) == (SessionStatus.COMPLETED, "answer", 3)
    assert (done.usage, done.timing, done.ended_at is None) == (USAGE, TIMING, False)
    assert done.finish_reason == "stop"
    assert done.message_id is not None
    reply = await store.get_message(done.message_id)
    assert (reply.text, reply.sender, reply.status) == ("answer", "llm", MessageStatus.COMPLETE)
    assert (reply.model, reply.provider) == ("other-model", "other")
    assert [message.text for message in await store.list_messages(new_session.conversation_id)] == [
        "question",
        "answer",
    ]
    await store.begin_reply(replace(new_session, id="next"), text="next")


async def test_the_first_end_wins(store: Store, new_session: NewSession) -> None:
    await store.begin_reply(new_session, text="question")
    first = await store.finish_session(
        new_session.id,
        status=SessionStatus.TERMINATED,
        text="half",
        token_count=1,
        termination_reason=TerminationReason.USER_REQUESTED,
    )
    assert (first.status, first.termination_reason) == (SessionStatus.TERMINATED, "USER_REQUESTED")
    late = await store.finish_session(new_session.id, status=SessionStatus.ERROR, text="more", error_code="TIMEOUT")
    assert late == first
    messages = await store.list_messages(new_session.conversation_id)
    assert [(message.text, message.status) for message in messages[1:]] == [("half", MessageStatus.TERMINATED)]


async def test_ends_at_once_are_one_end(url: str, store: Store, new_session: NewSession) -> None:
    await store.open_session(new_session)
    other = await Store.open(url)
    ends = await asyncio.gather(
        *(
            one.finish_session(new_session.id, status=status, text=f"{status} {number}", token_count=number)
            for number, one in enumerate((store, other))
            for status in (SessionStatus.COMPLETED, SessionStatus.TERMINATED, SessionStatus.ERROR)
        )
    )
    await other.close()
    assert len(set(ends)) == 1
    [reply] = await store.list_messages(new_session.conversation_id)
    assert (reply.id, reply.text) == (ends[0].message_id, ends[0].partial_response)


@pytest.mark.parametrize(
    ("status", "saved"),
    [
        (SessionStatus.COMPLETED, MessageStatus.COMPLETE),
        (SessionStatus.TERMINATED, MessageStatus.TERMINATED),
        (SessionStatus.ERROR, MessageStatus.ERROR),
    ],
)
async def test_a_partial_reply_says_how_it_ended(
    store: Store, new_session: NewSession, status: SessionStatus, saved: MessageStatus
) -> None:
    await store.open_session(new_session)
    done = await store.finish_session(new_session.id, status=status, text="some", message_id="reply")
    assert done.message_id == "reply"
    assert (await store.get_message("reply")).status is saved


async def test_an_empty_reply_is_no_message(store: Store, new_session: NewSession) -> None:
    await store.open_session(new_session)
    done = await store.finish_session(
        new_session.id, status=SessionStatus.ERROR, error_code="TIMEOUT", error_message="Too slow."
    )
    assert (done.message_id, done.error_code, done.error_message) == (None, "TIMEOUT", "Too slow.")
    assert await store.list_messages(new_session.conversation_id) == []


async def test_a_session_cannot_end_as_active_or_after_its_conversation(store: Store, new_session: NewSession) -> None:
    await store.open_session(new_session)
    with pytest.raises(InvalidInput):
        await store.finish_session(new_session.id, status=SessionStatus.ACTIVE)
    await store.delete_conversation(new_session.conversation_id)
    with pytest.raises(NotFound):
        await store.finish_session(new_session.id, status=SessionStatus.COMPLETED, text="late")


async def test_deleting_the_reply_keeps_its_session(store: Store, new_session: NewSession) -> None:
    await store.begin_reply(new_session, text="question", message_id="question")
    await store.finish_session(new_session.id, status=SessionStatus.COMPLETED, text="answer")
    assert await store.delete_messages_after(new_session.conversation_id, "question") == (1, [])
    assert (await store.get_session(new_session.id)).message_id is None


async def test_sessions_are_listed_newest_first(store: Store, new_session: NewSession) -> None:
    await store.create_conversation("other", "Other")
    await store.open_session(new_session)
    await store.finish_session(new_session.id, status=SessionStatus.COMPLETED)
    await store.open_session(replace(new_session, id="second"))
    await store.open_session(replace(new_session, id="third", conversation_id="other"))

    async def ids(conversation_id: str | None = None, status: SessionStatus | None = None, limit: int = 9) -> list[str]:
        return [session.id for session in await store.list_sessions(conversation_id, status, limit)]

    assert await ids() == ["third", "second", new_session.id]
    assert await ids(limit=1) == ["third"]
    assert await ids(new_session.conversation_id) == ["second", new_session.id]
    assert await ids(status=SessionStatus.COMPLETED) == [new_session.id]
    assert await ids("other", SessionStatus.ACTIVE) == ["third"]


async def test_sessions_are_listed_in_pages_and_without_private_ones(store: Store, new_session: NewSession) -> None:
    for id in "abcde":
        await store.create_conversation(id, id, password_hash="h" if id == "c" else None)
        await store.open_session(replace(new_session, id=f"of-{id}", conversation_id=id))
    async with store._db.write() as connection:
        await connection.exec_driver_sql("UPDATE stream_sessions SET started_at = '2026-01-01 00:00:00.000000'")
    pages: list[list[str]] = []
    cursor: Cursor | None = None
    while page := await store.list_sessions(limit=2, before=cursor):
        pages.append([session.id for session in page])
        cursor = Cursor.decode(Cursor.of(page[-1]).encode())
    assert pages == [["of-e", "of-d"], ["of-c", "of-b"], ["of-a"]]
    public = await store.list_sessions(status=SessionStatus.ACTIVE, public_only=True)
    assert [session.id for session in public] == ["of-e", "of-d", "of-b", "of-a"]


async def test_one_idempotency_key_is_one_reply(store: Store, new_session: NewSession) -> None:
    new = replace(new_session, idempotency_key="k", fingerprint="f")
    assert await store.session_by_key("k") is None
    begun = await store.begin_reply(new, text="question")
    assert await store.session_by_key("k") == begun.session
    with pytest.raises(AlreadyBegun) as again:
        await store.begin_reply(replace(new, id="second"), text="question")
    assert again.value.session_id == new.id
    await store.finish_session(new.id, status=SessionStatus.COMPLETED, text="answer")
    await store.create_conversation("other", "Other")
    with pytest.raises(AlreadyBegun):
        await store.begin_reply(replace(new, id="third", conversation_id="other"), text="question")
    assert [m.text for m in await store.list_messages(new.conversation_id)] == ["question", "answer"]
    assert await store.list_messages("other") == []


async def test_of_many_requests_with_one_key_one_begins(store: Store, new_session: NewSession) -> None:
    for number in range(6):
        await store.create_conversation(f"c{number}", "Tab")
    attempts = [
        store.begin_reply(replace(new_session, id=f"s{n}", conversation_id=f"c{n}", idempotency_key="k"), text="x")
        for n in range(6)
    ]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    begun = [result for result in results if not isinstance(result, BaseException)]
    assert len(begun) == 1
    others = [result for result in results if isinstance(result, AlreadyBegun)]
    assert {other.session_id for other in others} == {begun[0].session.id} and len(others) == 5


STRANGE = "A\x00b \ud800 \U0001f40d 'quoted'"


async def test_a_reply_may_begin_its_conversation(store: Store) -> None:
    new = NewSession("s", "fresh", "tiny-chat", "huggingface", owner="ingress-1", idempotency_key="k")
    fresh = NewConversation("fresh", STRANGE, "tiny-chat", None, "Be brief.")
    begun = await store.begin_reply(new, text=STRANGE, conversation=fresh)
    assert await store.get_conversation("fresh") == replace(fresh.empty(), message_count=1)
    assert begun.message == await store.get_message(begun.message.id)
    assert begun.session == await store.get_session("s")
    assert begun.session.question_id == begun.message.id


async def test_a_conversation_that_cannot_begin_leaves_nothing(store: Store, new_session: NewSession) -> None:
    new = replace(new_session, idempotency_key="k")
    await store.begin_reply(new, text="one")
    fresh = NewConversation("fresh", "Fresh")
    elsewhere = replace(new, id="s2", conversation_id="fresh", idempotency_key=None)
    with pytest.raises(InvalidInput, match="conversation"):
        taken = NewConversation(new.conversation_id, "Again")
        await store.begin_reply(replace(elsewhere, conversation_id=taken.id), text="two", conversation=taken)
    with pytest.raises(AlreadyBegun) as known:
        await store.begin_reply(replace(elsewhere, idempotency_key="k"), text="two", conversation=fresh)
    assert known.value.session_id == new.id
    with pytest.raises(InvalidInput, match="session"):
        await store.begin_reply(replace(elsewhere, id=new.id), text="two", conversation=fresh)
    with pytest.raises(NotFound):
        await store.get_conversation("fresh")
    assert len(await store.list_sessions()) == 1


@pytest.mark.parametrize("owned", [True, False], ids=["by its owner", "by anybody"])
async def test_an_end_has_its_message_and_the_rest_of_the_log(
    store: Store, new_session: NewSession, owned: bool
) -> None:
    await store.begin_reply(new_session, text="question")
    before = (await store.get_conversation(new_session.conversation_id)).updated_at
    rows = rows_of([Entry(Numbered(1, Token("answer", 0)), Origin("m", "p", 1, None, (7,)))], 0, 1)
    done = await store.finish_session(
        new_session.id,
        status=SessionStatus.TERMINATED,
        text=STRANGE,
        token_count=1,
        usage=USAGE,
        timing=TIMING,
        termination_reason=TerminationReason.USER_REQUESTED,
        model="m",
        provider="p",
        message_id="reply",
        provider_stopped=True,
        epoch=1 if owned else None,
        rows=rows,
    )
    assert done == await store.get_session(new_session.id)
    assert (done.message_id, done.usage, done.timing, done.provider_stopped) == ("reply", USAGE, TIMING, True)
    reply = await store.get_message("reply")
    assert (reply.text, reply.status, reply.model) == (done.partial_response, MessageStatus.TERMINATED, "m")
    assert [one.id for one in await store.list_messages(new_session.conversation_id)][1:] == ["reply"]
    assert (await store.read_log({done.id: 0}))[done.id][1] == rows
    assert (await store.get_conversation(new_session.conversation_id)).updated_at >= before
    again = await store.finish_session(
        done.id, status=SessionStatus.ERROR, text="late", model="m", provider="p", epoch=1 if owned else None
    )
    assert again == done


async def test_an_end_without_text_saves_no_message(store: Store, new_session: NewSession) -> None:
    await store.begin_reply(new_session, text="question")
    done = await store.finish_session(
        new_session.id, status=SessionStatus.ERROR, error_code="TIMEOUT", model="m", provider="p", epoch=1
    )
    assert (done.message_id, done.error_code) == (None, "TIMEOUT")
    assert len(await store.list_messages(new_session.conversation_id)) == 1


async def test_a_former_owner_ends_nothing(store: Store, new_session: NewSession) -> None:
    await store.begin_reply(new_session, text="question")
    kept = await store.finish_session(
        new_session.id, status=SessionStatus.COMPLETED, text="x", model="m", provider="p", epoch=7
    )
    assert kept.status is SessionStatus.ACTIVE
    assert len(await store.list_messages(new_session.conversation_id)) == 1


async def test_an_end_waits_for_a_message_that_is_being_added_and_comes_after_it(
    store: Store, new_session: NewSession
) -> None:
    await store.begin_reply(new_session, text="question")
    async with store._db.write() as connection:
        await touch(connection, new_session.conversation_id, utc_now())
        await insert_message(connection, new_message(new_session.conversation_id, "in between", "user"))
        ended = asyncio.create_task(
            store.finish_session(
                new_session.id, status=SessionStatus.COMPLETED, text="answer", model="m", provider="p", epoch=1
            )
        )
        await asyncio.wait({ended}, timeout=0.3)  # it meets the lock now, or comes later: both must come out right
        assert not ended.done()
    assert (await ended).status is SessionStatus.COMPLETED
    texts = [one.text for one in await store.list_messages(new_session.conversation_id)]
    assert texts == ["question", "in between", "answer"]
