"""Both ends of the wire, with calls that end, are cut off, and deliver in any order."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.domain.errors import GenerationFailed, Internal, ProviderUnavailable
from serve_app.domain.generation import Accepted, Delta, Finish, FinishReason, Item, Usage
from serve_app.frames import Broken, Frame, Piece, merged, pack, unpack
from serve_app.inbox import Inbox, Mailbox
from serve_app.outbox import AHEAD, FEW, FREE_S, MOST_PER_S, STRIDE, Outbox

FINISH = Finish(FinishReason.STOP, Usage(1, 3))
DELTAS = [Delta("a", (1,)), Delta("b", (2,)), Delta("c", (3,))]


def words(name: str, count: int) -> list[Item]:
    return [Accepted(1), *(Delta(f"{name}{n} ", (n,)) for n in range(count)), FINISH]


async def source(items: list[Item], pauses: random.Random | None = None) -> AsyncGenerator[Item, None]:
    for item in items:
        for _ in range(pauses.randrange(4) if pauses else 0):
            await asyncio.sleep(0)
        yield item


def flat(items: list[Item]) -> list[Item]:
    """The items with all their deltas joined: what a client sees, however it was cut."""
    return list(merged(list(items), 10**9))  # type: ignore[arg-type]


async def receive(mailbox: Mailbox) -> list[Item]:
    return [item async for item in mailbox]


def test_neighbouring_deltas_join_up_to_the_bound() -> None:
    assert merged([Accepted(1), *DELTAS, FINISH], 2) == [Accepted(1), Delta("ab", (1, 2)), Delta("c", (3,)), FINISH]
    assert merged(list(DELTAS), 1) == DELTAS


def test_a_frame_comes_out_of_its_bytes_as_it_went_in() -> None:
    error = Broken(GenerationFailed("broken").to_dict())
    thought = Delta("", (7,), reasoning="hm")
    frame = (Piece("a", 0, (Accepted(1), *DELTAS, thought, FINISH)), Piece("b", 9, (error,)))
    assert unpack(pack(frame)) == frame


async def test_one_stream_alone_leads_and_each_item_leaves_at_once() -> None:
    gates = [asyncio.Event() for _ in DELTAS]

    async def gated() -> AsyncGenerator[Item, None]:
        for gate, delta in zip(gates, DELTAS, strict=True):
            await gate.wait()
            yield delta
        yield FINISH

    call = Outbox().carry("s", gated())
    for number, (gate, delta) in enumerate(zip(gates, DELTAS, strict=True)):
        gate.set()
        frame = await anext(call)
        assert frame[0].items[0] == delta and frame[0].seq == number


async def test_two_streams_share_the_frames_of_the_first() -> None:
    outbox, go = Outbox(), asyncio.Event()

    async def waiting(name: str) -> AsyncGenerator[Item, None]:
        await go.wait()
        async for item in source(words(name, 2)):
            yield item

    first, second = outbox.carry("a", waiting("a")), outbox.carry("b", waiting("b"))
    leading, silent = asyncio.create_task(anext(first)), asyncio.create_task(anext(second))
    await asyncio.sleep(0)
    go.set()
    frame = await leading
    assert {piece.stream for piece in frame} == {"a", "b"}
    assert [piece.stream for piece in await silent] == ["b"]  # its own last word: what it sent lately
    for call in (first, second):
        with pytest.raises(StopAsyncIteration):
            await anext(call)
    assert outbox.empty


async def test_a_stream_that_runs_ahead_waits_and_makes_no_frame_large() -> None:
    outbox, made, count = Outbox(most_tokens=1), 0, 20 * AHEAD

    async def torrent() -> AsyncGenerator[Item, None]:
        nonlocal made
        for made in range(count):  # noqa: B007 - how far it came is read below
            yield DELTAS[0]
        yield FINISH

    async def quiet() -> AsyncGenerator[Item, None]:
        yield DELTAS[0]
        await asyncio.Event().wait()

    began = time.monotonic()
    fast, slow = outbox.carry("fast", torrent()), outbox.carry("slow", quiet())
    waiting = asyncio.create_task(anext(slow))
    await anext(fast)
    for _ in range(3):
        await asyncio.sleep(0)
    assert made <= 2 * AHEAD
    mailbox = Mailbox()
    sizes = []
    async for frame in fast:
        sizes.append(sum(len(piece.items) for piece in frame if piece.stream == "fast"))
        for piece in frame:
            if piece.stream == "fast":
                mailbox.deliver(piece)
    assert max(sizes) <= AHEAD and sum(sizes) >= count + 1 - AHEAD
    assert time.monotonic() - began >= (count - STRIDE) / MOST_PER_S - FREE_S  # the processors are not its alone
    waiting.cancel()


async def test_only_a_stream_with_neighbours_is_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    original = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.extend([seconds] * (seconds > 0))
        await original(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    outbox, halfway, arrived = Outbox(most_tokens=1, clock=lambda: 0.0), asyncio.Event(), asyncio.Event()
    alone = int(4 * FREE_S * MOST_PER_S)

    async def torrent() -> AsyncGenerator[Item, None]:
        for _ in range(alone):
            yield DELTAS[0]
        halfway.set()
        await arrived.wait()
        for _ in range(2 * STRIDE):
            yield DELTAS[0]
        yield FINISH

    async def neighbour() -> AsyncGenerator[Item, None]:
        arrived.set()
        await asyncio.Event().wait()
        yield FINISH

    async def count(call: AsyncGenerator[Frame, None]) -> int:
        return sum([len(piece.items) async for frame in call for piece in frame if piece.stream == "fast"])

    reading = asyncio.create_task(count(outbox.carry("fast", torrent())))
    await halfway.wait()
    assert slept == []
    other = asyncio.create_task(anext(outbox.carry("other", neighbour())))
    assert await reading == alone + 2 * STRIDE + 1
    assert slept == pytest.approx([STRIDE / MOST_PER_S, 2 * STRIDE / MOST_PER_S])  # at once: no burst is free
    other.cancel()


async def test_what_is_sent_again_comes_in_frames_of_a_few_pieces() -> None:
    outbox, gate, count = Outbox(most_tokens=1), asyncio.Event(), 40 * AHEAD

    async def held(items: list[Item]) -> AsyncGenerator[Item, None]:
        for item in items[:-1]:
            yield item
        await gate.wait()
        yield items[-1]

    leader, other = outbox.carry("leader", held(words("l", 1))), outbox.carry("other", held(words("h", count)))
    await anext(leader)
    reading = asyncio.create_task(receive(mailbox := Mailbox()))
    frames: list[Frame] = []

    async def follow() -> None:
        async for frame in other:
            frames.append(frame)
            for piece in frame:
                mailbox.deliver(piece)

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    while outbox._streams["other"].next_seq < count:
        await anext(leader)
    await leader.aclose()  # all that was in its frames is lost
    gate.set()
    assert flat(await reading) == flat(words("h", count))
    await following
    assert max(len(frame) for frame in frames) == FEW and len(frames) > 2


async def test_an_error_comes_after_what_was_ready_before_it() -> None:
    async def failing() -> AsyncGenerator[Item, None]:
        yield DELTAS[0]
        raise GenerationFailed("broken")

    [frame] = [frame async for frame in Outbox().carry("s", failing())]
    mailbox = Mailbox()
    mailbox.deliver(frame[0])
    items = aiter(mailbox)
    assert await anext(items) == DELTAS[0]
    with pytest.raises(GenerationFailed, match="broken"):
        await anext(items)


async def test_a_fault_is_masked_and_a_source_without_an_end_is_one() -> None:
    async def faulty() -> AsyncGenerator[Item, None]:
        raise ZeroDivisionError("secret")
        yield FINISH

    async def endless() -> AsyncGenerator[Item, None]:
        yield DELTAS[0]

    for broken in (faulty(), endless()):
        [frame] = [frame async for frame in Outbox().carry("s", broken)]
        last = frame[-1].items[-1]
        assert isinstance(last, Broken) and last.error == Internal.masked().to_dict()


async def test_closing_a_call_closes_its_source_and_promotes_the_next() -> None:
    outbox, closed = Outbox(), asyncio.Event()

    async def endless() -> AsyncGenerator[Item, None]:
        try:
            while True:
                yield DELTAS[0]
                await asyncio.sleep(0)
        finally:
            closed.set()

    leader, other = outbox.carry("a", endless()), outbox.carry("b", endless())
    await anext(leader)
    waiting = asyncio.create_task(anext(other))
    await asyncio.sleep(0)
    await leader.aclose()
    assert closed.is_set()
    assert {piece.stream for piece in await waiting} == {"b"}
    await other.aclose()
    assert outbox.empty


async def test_a_missing_piece_ends_the_stream_with_an_error_when_its_call_is_over() -> None:
    mailbox = Mailbox(gap_s=0.01)
    mailbox.deliver(Piece("s", 0, (Accepted(1),)))
    mailbox.deliver(Piece("s", 2, (FINISH,)))
    mailbox.call_ended(asyncio.get_running_loop().time())
    items = aiter(mailbox)
    assert await anext(items) == Accepted(1)
    with pytest.raises(ProviderUnavailable):
        await anext(items)


async def test_a_failed_call_is_told_after_what_has_come() -> None:
    mailbox = Mailbox()
    mailbox.deliver(Piece("s", 0, (Accepted(1), DELTAS[0])))
    mailbox.fail(ProviderUnavailable("gone"))
    items = aiter(mailbox)
    assert [await anext(items), await anext(items)] == [Accepted(1), DELTAS[0]]
    with pytest.raises(ProviderUnavailable):
        await anext(items)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), streams=st.integers(1, 6), cut=st.integers(0, 4))
def test_every_stream_that_is_not_cut_arrives_whole_once_and_in_order(seed: int, streams: int, cut: int) -> None:
    """Calls start at any time, some are cut off with their frames in flight, and frames overtake each other."""
    asyncio.run(_exchange(random.Random(seed), streams, cut))


async def _exchange(chance: random.Random, streams: int, cut: int) -> None:
    outbox, inbox = Outbox(chance.randrange(1, 5)), Inbox()
    names = [f"s{n}" for n in range(streams)]
    expected = {name: words(name, chance.randrange(30)) for name in names}
    doomed = set(names[:cut])
    mailboxes = {name: inbox.open(name) for name in names}

    async def deliver_late(frame: Frame) -> None:
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        inbox.deliver(frame)

    async def call(name: str) -> None:
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        left = chance.randrange(4) if name in doomed else 10**9
        frames = outbox.carry(name, source(expected[name], chance))
        flying: list[asyncio.Task[None]] = []
        async for frame in frames:
            left -= 1
            if left < 0:
                break  # cut off: this frame, and maybe the ones in flight, are lost
            flying.append(asyncio.create_task(deliver_late(frame)))
        await frames.aclose()
        if name in doomed:
            for task in flying:
                if chance.random() < 0.5:
                    task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
        mailboxes[name].call_ended(asyncio.get_running_loop().time())

    readers = {name: asyncio.create_task(receive(mailboxes[name])) for name in names if name not in doomed}
    async with asyncio.timeout(10):
        await asyncio.gather(*(call(name) for name in names))
        for name, reader in readers.items():
            assert flat(await reader) == flat(expected[name])
    assert outbox.empty
