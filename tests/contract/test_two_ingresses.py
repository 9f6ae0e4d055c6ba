"""Two ingresses on one database: each follows, ends and adopts the streams of the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from serve_app.domain.conversation import MessageStatus, SessionStatus, StreamSession, TerminationReason
from serve_app.domain.events import Numbered, Rewind, Terminated, Token
from serve_app.replies import LiveReply, NewReply
from serve_app.store import migrate
from serve_app.store.tables import metadata
from serve_app.telemetry.metrics import Totals
from serve_app.telemetry.spans import rows_of
from serve_app.telemetry.tracing import Tracing
from tests.doubles import LocalPlatform, build_services
from tests.postgres import Postgres
from tests.spans import USAGE, Trace
from tests.unit.telemetry.test_metrics import samples

PACED = "hello [[tokens=150 pace=0.01]]"
WHOLE = " ".join(f"word{n}" for n in range(150))
# An ingress that is cut off has an engine that hangs after a while: a busy machine would else let the reply end before
# the database is away.

Make = Callable[..., Awaitable[LocalPlatform]]


@pytest.fixture(scope="session")
def shared_database(postgres: Postgres) -> str:
    url = postgres.create("ingresses")
    migrate.upgrade(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        migrate.upgrade(f"sqlite+aiosqlite:///{tmp_path / 'rotunda.db'}")
        yield f"sqlite+aiosqlite:///{tmp_path / 'rotunda.db'}"
        return
    yield request.getfixturevalue("shared_database")
    server: Postgres = request.getfixturevalue("postgres")
    server.execute("ingresses", f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")


@pytest.fixture
async def make(url: str, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[LocalPlatform] = []

    async def one(**settings: object) -> LocalPlatform:
        number = len(made)
        (tmp_path / str(number)).mkdir()
        owner = f"ingress-{number}"
        made.append(await build_services(tmp_path / str(number), owner=owner, database_url=url, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for platform in made:
        await platform.close()


async def begin(platform: LocalPlatform, message: str = PACED, **fields: object) -> LiveReply:
    conversation = await platform.services.store.create_conversation("c", "A conversation")
    return await platform.services.sessions.start(NewReply(conversation, message, **fields))  # type: ignore[arg-type]


async def read(platform: LocalPlatform, session: StreamSession, after: int = 0, most: int = 10_000) -> list[Numbered]:
    """The events that a reader at this ingress gets, ``most`` of them at most."""
    seen: list[Numbered] = []
    async with asyncio.timeout(60), aclosing(platform.services.sessions.follow(session, after)) as events:
        async for numbered in events:
            seen.append(numbered)
            if len(seen) == most:
                break
    return seen


def text_of(events: list[Numbered]) -> str:
    """What a client holds that obeys ``rewind``; each text begins where it ends, and no number is left out."""
    text, last = "", events[0].seq - 1
    for numbered in events:
        if isinstance(numbered.event, Rewind):
            text, last = text[: numbered.event.offset], numbered.event.seq
            continue
        assert numbered.seq == last + 1
        last = numbered.seq
        if isinstance(numbered.event, Token):
            assert numbered.event.offset == len(text)
            text += numbered.event.text
    return text


async def ended(platform: LocalPlatform, session_id: str) -> StreamSession:
    """The session when it has ended, without a reader."""
    async with asyncio.timeout(30):
        while True:
            session = await platform.services.store.get_session(session_id)
            if session.status is not SessionStatus.ACTIVE:
                return session
            await asyncio.sleep(0.1)


async def logged(platform: LocalPlatform, reply: LiveReply, words: int) -> None:
    """Return when the log holds so many words: what comes later may be lost with the ingress."""
    async with asyncio.timeout(60):
        while len((await log_of(platform, reply.session.id)).split()) < words:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def log_of(platform: LocalPlatform, session_id: str) -> str:
    _, rows = (await platform.services.store.read_log({session_id: 0}))[session_id]
    return "".join(row.text for row in rows)


async def test_a_second_viewer_elsewhere_sees_the_same_stream_from_its_beginning(make: Make) -> None:
    here, there = await make(), await make()
    reply = await begin(here)
    first = asyncio.create_task(read(here, reply.session))
    await logged(there, reply, 30)
    late = [asyncio.create_task(read(there, reply.session)) for _ in range(3)]
    middle = asyncio.create_task(read(there, reply.session, after=20))
    seen = await first
    assert text_of(seen) == WHOLE
    for other in late:
        assert await other == seen
    assert await middle == seen[20:]
    assert await log_of(there, reply.session.id) == WHOLE
    # What was followed elsewhere is forgotten when it has ended.
    assert repr(there.services.sessions._tails) == "Tails([])"


async def test_readers_of_one_tail_cost_one_reading(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = await make(), await make(stream_tick_ms=100)
    reply = await begin(here)
    readings = 0
    real = there.services.store.read_log

    async def counted(positions: dict[str, int]) -> object:
        nonlocal readings
        readings += 1
        return await real(positions)

    monkeypatch.setattr(there.services.store, "read_log", counted)
    loop = asyncio.get_running_loop()
    began = loop.time()
    readers = [asyncio.create_task(read(there, reply.session)) for _ in range(20)]
    texts = {text_of(await reader) for reader in readers}
    assert texts == {WHOLE}
    assert readings <= 20 + (loop.time() - began) / 0.1 + 1


async def test_a_stream_can_be_ended_from_elsewhere(make: Make) -> None:
    here, there = await make(), await make()
    reply = await begin(here, "hello [[tokens=100000 pace=0.005]]")
    await reply.stream.wait_beyond(20)
    ending = await there.services.sessions.terminate(reply.session.id, "c", TerminationReason.USER_REQUESTED)
    done = ending.session
    assert (done.status, done.termination_reason) == (SessionStatus.TERMINATED, "USER_REQUESTED")
    assert done.partial_response == text_of(await read(there, reply.session)) == await log_of(here, done.id)
    assert done.usage is not None and done.usage.completion_tokens == len(done.partial_response.split())
    assert done.provider_stopped is True
    assert here.engine.counters().running == 0


async def test_a_follower_adopts_the_stream_of_a_dead_ingress_and_nothing_is_lost(make: Make) -> None:
    here, there = await make(extra={"hang_at": 60}), await make()
    reply = await begin(here)
    follower = asyncio.create_task(read(there, reply.session))
    await logged(there, reply, 50)
    with here.cut_off():
        seen = await follower
        assert text_of(seen) == WHOLE
        assert [type(one.event) for one in seen if one.event.terminal] == [type(seen[-1].event)]
        assert seen[-1].event.name == "end"
        session = await there.services.store.get_session(reply.session.id)
        assert (session.status, session.owner, session.epoch) == (SessionStatus.COMPLETED, "ingress-1", 2)
        assert session.usage is not None and session.usage.completion_tokens == 150
    # The old owner comes back, and stops without a word.
    async with asyncio.timeout(10):
        await reply.done.wait()
    assert reply.moved and not reply.stream.finished
    messages = await there.services.store.list_messages("c")
    assert [(message.sender, message.text) for message in messages] == [("user", PACED), ("llm", WHOLE)]
    assert await log_of(here, session.id) == WHOLE


async def test_a_reader_of_the_dead_ingress_goes_back_to_what_was_logged(make: Make) -> None:
    here, there = await make(extra={"hang_at": 120}), await make()
    reply = await begin(here)
    local = asyncio.create_task(read(here, reply.session))
    await logged(there, reply, 50)
    with here.cut_off():
        await reply.stream.wait_beyond(110)
        seen = await read(here, reply.session, most=110)
        later = await read(there, reply.session, after=seen[-1].seq)
    assert isinstance(later[0].event, Rewind) and later[0].event.seq < 110
    assert text_of(seen + later) == WHOLE
    # One that stayed is led on by its own ingress, once that hears that the stream has moved.
    stayed = await local
    assert text_of(stayed) == WHOLE
    assert [one.event.name for one in stayed if one.event.terminal] == ["end"]


async def test_the_sweep_adopts_what_nobody_follows(make: Make) -> None:
    here, there = await make(extra={"hang_at": 100}), await make()
    reply = await begin(here, "hello [[tokens=400 pace=0.01]]")
    await logged(there, reply, 30)
    with here.cut_off():
        session = await ended(there, reply.session.id)
    assert (session.status, session.owner) == (SessionStatus.COMPLETED, "ingress-1")
    assert session.partial_response == " ".join(f"word{n}" for n in range(400))


async def test_beyond_its_grace_an_orphan_ends_with_its_partial(make: Make) -> None:
    here, there = await make(), await make(detach_grace_ms=0)
    reply = await begin(here, "hello [[tokens=100000 pace=0.005]]")
    await logged(there, reply, 30)
    with here.cut_off():
        session = await ended(there, reply.session.id)
    assert (session.status, session.error_code) == (SessionStatus.ERROR, "PROVIDER_UNAVAILABLE")
    message = (await there.services.store.last_messages("c", 1))[0]
    assert (message.text, message.status) == (session.partial_response, MessageStatus.ERROR)
    assert text_of(await read(there, session)) == message.text


async def test_a_stream_is_terminated_although_its_owner_is_dead(make: Make) -> None:
    here, there = await make(), await make()
    reply = await begin(here, "hello [[tokens=100000 pace=0.005]]")
    await logged(there, reply, 30)
    with here.cut_off():
        ending = await there.services.sessions.terminate(reply.session.id, "c", TerminationReason.USER_REQUESTED)
    done = ending.session
    assert (done.status, done.termination_reason) == (SessionStatus.TERMINATED, "USER_REQUESTED")
    assert done.partial_response
    last = (await read(there, done))[-1].event
    assert last == Terminated(done.id, done.partial_response, done.token_count, "USER_REQUESTED")


async def test_an_ingress_that_leaves_hands_its_streams_over(make: Make) -> None:
    here, there = [await make(tracing=Tracing.set_up("ingress", name, {})) for name in ("here", "there")]
    trace = here.services.tracing.serve("request", None, trust=False)
    reply = await begin(here, "hello [[tokens=1000 pace=0.01]]", trace=trace)
    follower = asyncio.create_task(read(here, reply.session))
    await reply.stream.wait_beyond(40)
    await here.services.sessions.hand_over()
    elsewhere = asyncio.create_task(read(there, reply.session))
    for seen in (await follower, await elsewhere):
        assert text_of(seen) == " ".join(f"word{n}" for n in range(1000))
        assert seen[-1].event.name == "end"
    assert (await there.services.store.get_session(reply.session.id)).epoch == 2
    # It is one reply, whose tokens count once.
    totals = Totals()
    for platform in (here, there):
        totals.hear(repr(platform.services.sessions), platform.services.tracing.metrics.snapshot(), 0)
    page = samples(totals.page(0))
    assert page["rotunda_sessions_total{status=completed}"] == 1
    assert [value for name, value in page.items() if "rotunda_tokens_total" in name and "output" in name] == [1000]
    assert [value for name, value in page.items() if "request_duration_seconds_count" in name] == [1]
    tracing = here.services.tracing, there.services.tracing
    rows = [row for one in tracing for row in rows_of(one.outgoing.drain())]
    first, second = (Trace(row for row in rows if (row.trace_id == trace.trace_id) is one) for one in (True, False))
    assert second.root.name == "adopt" and second.links(second.root)["session"][0] == trace.trace_id
    told = [(one, one.attributes(row)[USAGE]) for one in (first, second) for row in one.rows if USAGE in row.body]
    assert told == [(second, 1000)]


async def test_a_store_that_is_away_delays_the_log_and_not_the_tokens(make: Make) -> None:
    here, there = await make(), await make()
    reply = await begin(here, "hello [[tokens=120 pace=0.005]]")
    await reply.stream.wait_beyond(20)
    with here.cut_off(), there.cut_off():
        # All of it comes while nothing can be written; the end waits to be recorded.
        await reply.stream.wait_beyond(120)
        assert not reply.stream.finished
        await asyncio.sleep(1.5)  # longer than an ownership lasts
    seen = await read(here, reply.session)
    assert text_of(seen) == " ".join(f"word{n}" for n in range(120))
    assert seen[-1].event.name == "end"
    session = await there.services.store.get_session(reply.session.id)
    # Nobody took it for dead: nobody could have renewed.
    assert (session.owner, session.epoch, session.status) == ("ingress-0", 1, SessionStatus.COMPLETED)
    assert await log_of(there, session.id) == session.partial_response


async def test_a_log_too_far_behind_holds_the_model_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    here = await make()
    reply = await begin(here, "hello [[tokens=500]]")
    object.__setattr__(reply._limits, "max_unlogged", 50)
    with here.cut_off():
        for _ in itertools.repeat(None, 50):
            await asyncio.sleep(0.01)
        assert 50 <= len(reply.stream.events) < 60
    assert text_of(await read(here, reply.session)) == " ".join(f"word{n}" for n in range(500))
