"""Who owns a stream, what its log says, and that a former owner changes neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from serve_app.domain.conversation import MessageStatus, SessionStatus, TerminationReason
from serve_app.domain.errors import NotFound
from serve_app.domain.events import Failed, Numbered, Queued, SessionOpened, Terminated, Token
from serve_app.domain.generation import Options
from serve_app.domain.stream_log import Entry, LogRow, Origin, Transcript, rows_of
from serve_app.domain.wanted import Wanted
from serve_app.store import NewSession, Store
from serve_app.store.ownership import MAX_EPOCHS

WANTED = Wanted("tiny-chat", "Be brief.", options=Options(temperature=0, stop=("x",), logit_bias={5: 1.0}))


@pytest.fixture
async def running(store: Store, new_session: NewSession) -> AsyncIterator[NewSession]:
    """A session of ingress-1 that can be adopted."""
    new = replace(new_session, wanted=WANTED)
    await store.begin_reply(new, text="question", message_id="question")
    yield new


def text_rows(*texts: str, seq: int = 1, offset: int = 0, epoch: int = 1) -> list[LogRow]:
    entries = []
    for number, text in enumerate(texts, seq):
        entries.append(
            Entry(Numbered(number, Token(text, offset)), Origin("tiny-chat", "huggingface", 1, "r", (number,)))
        )
        offset += len(text)
    return rows_of(entries, 0, epoch)


async def expire(store: Store) -> None:
    """Let every ownership run out, without waiting for it."""
    async with store._db.write() as connection:
        await connection.exec_driver_sql("UPDATE stream_sessions SET owned_until_ms = owned_until_ms - 3600000")


async def told(store: Store, session_id: str) -> Transcript:
    transcript = Transcript()
    transcript.add((await store.read_log({session_id: 0}))[session_id][1])
    return transcript


async def test_a_batch_of_many_streams_is_one_call(store: Store, running: NewSession) -> None:
    await store.create_conversation("other", "Other")
    await store.begin_reply(replace(running, id="s2", conversation_id="other"), text="question")
    batches = {running.id: text_rows("one ", "two"), "s2": text_rows("drei")}
    pulses = await store.write_log("ingress-1", [running.id, "s2", "unknown"], batches)
    assert {id: tuple(pulse) for id, pulse in pulses.items()} == {running.id: (1, None), "s2": (1, None)}
    first = await told(store, running.id)
    assert (first.text, first.token_ids, [event.seq for event in first.events]) == ("one two", [1, 2], [1, 2])
    assert [event.event for event in first.events] == [Token("one ", 0), Token("two", 4)]
    assert (await told(store, "s2")).text == "drei"
    assert (await store.get_session(running.id)).partial_response == "one two"
    assert {session.partial_response for session in await store.list_sessions()} == {"one two", "drei"}


async def test_a_batch_written_twice_is_there_once(store: Store, running: NewSession) -> None:
    for _ in range(2):
        await store.write_log("ingress-1", [running.id], {running.id: text_rows("one ", "two")})
    await store.write_log("ingress-1", [running.id], {running.id: text_rows(" three", seq=3, offset=7)})
    assert (await told(store, running.id)).text == "one two three"
    state, rows = (await store.read_log({running.id: 2}))[running.id]
    assert (state.active, state.abandoned, [row.text for row in rows]) == (True, False, [" three"])
    assert await store.read_log({"unknown": 0}) == {}


async def test_events_of_every_kind_come_back_as_they_were(store: Store, running: NewSession) -> None:
    events = [
        SessionOpened(running.id, "talk", "tiny-chat", "huggingface", "t", 3),
        Queued(2, "memory is full \U0001f600", None),
        Token("a\u2028b", 0),
    ]
    entries = [Entry(Numbered(seq, event), Origin("m", "p", 1)) for seq, event in enumerate(events, 1)]
    await store.write_log("ingress-1", [running.id], {running.id: rows_of(entries, 0, 1)})
    assert [one.event for one in (await told(store, running.id)).events] == events


async def test_ownership_is_renewed_by_its_owner_only(store: Store, running: NewSession) -> None:
    assert set(await store.write_log("ingress-1", [running.id, "unknown"], {}, renew_s=5)) == {running.id}
    assert await store.write_log("ingress-2", [running.id], {running.id: text_rows("foreign")}, renew_s=5) == {}
    assert (await told(store, running.id)).events == []
    await expire(store)
    assert [one.session.id for one in await store.abandoned_sessions()] == [running.id]
    await store.write_log("ingress-1", [running.id], {}, renew_s=5)
    assert await store.abandoned_sessions() == []
    await store.finish_session(running.id, status=SessionStatus.COMPLETED)
    assert await store.write_log("ingress-1", [running.id], {}, renew_s=5) == {}


async def test_ownership_runs_out_by_the_databases_clock(store: Store, new_session: NewSession) -> None:
    await store.open_session(replace(new_session, ttl_s=-0.5))
    [one] = await store.abandoned_sessions()
    assert 0.5 <= one.for_s < 30
    await store.write_log("ingress-1", [new_session.id], {}, renew_s=3600)
    assert await store.abandoned_sessions() == []


async def test_a_termination_reaches_the_owner_once_asked_for(store: Store, running: NewSession) -> None:
    assert await store.request_termination(running.id, TerminationReason.USER_REQUESTED)
    assert await store.request_termination(running.id, "a second thought")
    assert (await store.write_log("ingress-1", [running.id], {}))[running.id].terminate == "USER_REQUESTED"
    await store.finish_session(running.id, status=SessionStatus.TERMINATED)
    assert await store.write_log("ingress-1", [running.id], {}) == {}
    assert not await store.request_termination(running.id, "late")
    with pytest.raises(NotFound):
        await store.request_termination("unknown", "why")


async def test_an_abandoned_session_is_adopted_once_with_its_log(store: Store, running: NewSession) -> None:
    await store.write_log("ingress-1", [running.id], {running.id: text_rows("so ", "far")})
    assert await store.adopt_session(running.id, "ingress-2") is None
    await expire(store)
    assert await store.adopt_session(running.id, "ingress-2", within_s=-1) is None
    results = await asyncio.gather(*(store.adopt_session(running.id, f"ingress-{n}") for n in (2, 3)))
    [adopted] = [result for result in results if result is not None]
    assert adopted.session.owner in ("ingress-2", "ingress-3")
    assert (adopted.session.epoch, adopted.session.wanted, adopted.session.question_id) == (2, WANTED, "question")
    assert [row.text for row in adopted.rows] == ["so far"]
    assert await store.close_abandoned() == []


async def test_what_a_former_owner_writes_is_dropped_alone(store: Store, running: NewSession) -> None:
    await store.create_conversation("other", "Other")
    await store.begin_reply(replace(running, id="s2", conversation_id="other"), text="question")
    await store.write_log("ingress-1", [running.id], {running.id: text_rows("so far")})
    await expire(store)
    assert await store.adopt_session(running.id, "ingress-2") is not None
    late = {running.id: text_rows(" too late", seq=2, offset=6), "s2": text_rows("in time")}
    assert set(await store.write_log("ingress-1", [running.id, "s2"], late, renew_s=5)) == {"s2"}
    await store.write_log("ingress-2", [running.id], {running.id: text_rows(" and on", seq=2, offset=6, epoch=2)})
    transcript = await told(store, running.id)
    assert (transcript.text, transcript.starts, transcript.epoch) == ("so far and on", [(1, 6)], 2)
    assert (await told(store, "s2")).text == "in time"
    refused = await store.finish_session(running.id, epoch=1, status=SessionStatus.COMPLETED, text="so far too late")
    assert (refused.status, refused.epoch) == (SessionStatus.ACTIVE, 2)
    assert [m.text for m in await store.list_messages(running.conversation_id)] == ["question"]
    done = await store.finish_session(running.id, epoch=2, status=SessionStatus.COMPLETED, text="so far and on")
    assert done.status is SessionStatus.COMPLETED


async def test_what_nobody_can_go_on_with_is_not_adopted(store: Store, new_session: NewSession) -> None:
    await store.open_session(new_session)
    await expire(store)
    assert await store.adopt_session(new_session.id, "ingress-2") is None
    [closed] = await store.close_abandoned([new_session.id, "unknown"], hopeless=True)
    assert closed.status is SessionStatus.ERROR


async def test_a_stream_whose_owners_keep_dying_ends(store: Store, running: NewSession) -> None:
    for number in range(2, MAX_EPOCHS + 1):
        await expire(store)
        assert await store.adopt_session(running.id, f"ingress-{number}") is not None
    await expire(store)
    assert await store.adopt_session(running.id, "one too many") is None


async def test_an_abandoned_session_ends_with_its_partial_saved(store: Store, running: NewSession) -> None:
    await store.write_log("ingress-1", [running.id], {running.id: text_rows("half ", "an ans")})
    assert await store.close_abandoned() == []
    await expire(store)
    assert await store.close_abandoned([]) == []
    assert await store.close_abandoned(hopeless=True) == []
    closed = await asyncio.gather(store.close_abandoned(), store.close_abandoned())
    [session] = [session for some in closed for session in some]
    assert (session.status, session.error_code, session.token_count) == (SessionStatus.ERROR, "PROVIDER_UNAVAILABLE", 2)
    reply = (await store.last_messages(running.conversation_id, 1))[0]
    assert (reply.id, reply.text, reply.status) == (session.message_id, "half an ans", MessageStatus.ERROR)
    transcript = await told(store, running.id)
    assert isinstance(transcript.events[-1].event, Failed) and transcript.events[-1].seq == 3
    late = await store.finish_session(running.id, status=SessionStatus.COMPLETED, text="half an answer", epoch=1)
    assert late == session


async def test_an_abandoned_session_that_should_stop_is_terminated(store: Store, running: NewSession) -> None:
    await store.write_log("ingress-1", [running.id], {running.id: text_rows("half")})
    await store.request_termination(running.id, "USER_REQUESTED")
    await expire(store)
    assert await store.adopt_session(running.id, "ingress-2") is None
    [session] = await store.close_abandoned()
    assert (session.status, session.termination_reason) == (SessionStatus.TERMINATED, "USER_REQUESTED")
    assert session.error_code is None
    [*_, end] = (await told(store, running.id)).events
    assert end.event == Terminated(running.id, "half", 1, "USER_REQUESTED")


async def test_a_session_that_was_given_up_is_adopted_at_once_or_counts_as_terminated(
    store: Store, running: NewSession
) -> None:
    assert not await store.release_session(running.id, 2, [])
    assert await store.release_session(running.id, 1, text_rows("so far"))
    adopted = await store.adopt_session(running.id, "ingress-2")
    assert adopted is not None and [row.text for row in adopted.rows] == ["so far"]
    assert await store.release_session(running.id, 2, [])
    [session] = await store.close_abandoned()
    assert (session.status, session.termination_reason) == (SessionStatus.TERMINATED, "SERVER_SHUTDOWN")


async def test_a_dead_owner_does_not_keep_its_conversation_busy(store: Store, running: NewSession) -> None:
    await store.write_log("ingress-1", [running.id], {running.id: text_rows("half")})
    await expire(store)
    await store.begin_reply(replace(running, id="next", owner="ingress-2"), text="again")
    assert (await store.get_session(running.id)).status is SessionStatus.ERROR
    assert [m.text for m in await store.list_messages(running.conversation_id)] == ["question", "half", "again"]


async def test_logs_go_some_time_after_the_end(store: Store, running: NewSession) -> None:
    await store.write_log("ingress-1", [running.id], {running.id: text_rows("half")})
    now = datetime.now(UTC) + timedelta(seconds=5)
    assert await store.prune_log(now) == 0
    await store.finish_session(running.id, status=SessionStatus.COMPLETED, text="half")
    assert await store.prune_log(now - timedelta(hours=1)) == 0
    assert (await told(store, running.id)).text == "half"
    assert [await store.prune_log(now) for _ in range(2)] == [1, 0]
    assert (await told(store, running.id)).events == []
    assert (await store.get_session(running.id)).partial_response == "half"
