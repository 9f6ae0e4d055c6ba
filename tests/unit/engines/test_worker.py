"""The thread that computes: order, fairness, faults, cancellation. The decoder is played by hand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest

from serve_app.domain.errors import GenerationFailed, Internal, InvalidInput, ProviderUnavailable, RotundaError
from serve_app.domain.generation import Delta, Finish, FinishReason, GenerationRequest, Message, Options, Priority
from serve_app.engines.ledger import Ledger
from serve_app.engines.prompt import Prompt
from serve_app.engines.reply import Format
from serve_app.engines.text import Detokenizer
from serve_app.engines.worker import Job, Outgoing, Worker

END = 99


class Puppet:
    """Token ``n`` of each job is ``n``; each step waits until the test lets it go."""

    def __init__(self, free: bool = True) -> None:
        self.calls: list[str] = []
        self.places: int | None = None
        self.description = "played by hand"
        self.gate = threading.Semaphore(10**6 if free else 0)
        self.faults: dict[str, Exception] = {}
        self.end_at: int | None = None
        self.broken: Exception | None = None
        self.parts: dict[str, int] = {}  # turns that a prompt takes to read

    def turn(self, reading: Sequence[Job], running: Sequence[Job]) -> Iterator[Mapping[Job, int | Exception]]:
        if reading:
            yield self.start(reading[0])
        if running:
            yield self.advance(running)

    def start(self, job: Job) -> dict[Job, int | Exception]:
        self.gate.acquire()
        name = job.request.request_id
        self.calls.append(f"start {name}")
        if self.broken:
            raise self.broken
        if left := self.parts.pop(name, 1) - 1:
            self.parts[name] = left
            return {}
        return {job: self.faults.get(f"start {name}", 0)}

    def advance(self, jobs: Sequence[Job]) -> dict[Job, int | Exception]:
        self.gate.acquire()
        self.calls.append("advance " + " ".join(job.request.request_id for job in jobs))
        if self.broken:
            raise self.broken
        return {job: self.faults.get(job.request.request_id, len(job.tokens)) for job in jobs}

    def ends(self, token: int) -> bool:
        return token == self.end_at

    def release(self, job: Job) -> None:
        self.calls.append(f"release {job.request.request_id}")


def job_of(
    name: str, tokens: int = 3, priority: Priority = Priority.NORMAL, stop: str | None = None, room: int = 1
) -> Job:
    options = Options(stop=(stop,) if stop else ())
    request = GenerationRequest(name, "m", (Message.of("user", "x"),), options, priority)

    def text(ids: Sequence[int]) -> str:
        return "".join(f"t{token} " for token in ids)

    stream = Format().stream(request, Detokenizer(lambda token: text([token]), text), options.stop)
    prompt = Prompt(tuple(range(room)), 0, tokens, options.stop)
    return Job(request, prompt, stream, asyncio.get_running_loop(), time.monotonic())


class Bench:
    """A worker with its ledger, as an engine would have them."""

    def __init__(self, puppet: Puppet, max_running: int = 4, max_tokens: int = 1000, stall_s: float = 600.0) -> None:
        self.ledger = Ledger()
        self.worker = Worker(puppet, self.ledger, max_running, max_tokens, stall_s)

    def submit(self, job: Job) -> Job:
        self.ledger.enter()
        self.worker.submit(job)
        return job


async def read(job: Job) -> list[Outgoing]:
    items: list[Outgoing] = []
    while not items or isinstance(items[-1], Delta):
        items.append(await asyncio.wait_for(job.items.get(), 10))
    return items


def text_of(items: list[Outgoing]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


async def until_calls(puppet: Puppet, count: int) -> None:
    for _ in range(5000):
        if len(puppet.calls) >= count:
            return
        await asyncio.sleep(0.001)
    raise TimeoutError(puppet.calls)


async def test_a_newcomer_joins_between_steps_and_all_go_on_together() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    a, b = bench.submit(job_of("a", 4)), bench.submit(job_of("b", 2))
    puppet.gate.release(20)
    assert text_of(await read(a)) == "t0 t1 t2 t3 "
    assert text_of(await read(b)) == "t0 t1 "
    assert puppet.calls == [
        "start a", "start b", "advance a", "advance a b", "release b", "advance a", "release a",
    ]  # fmt: skip
    bench.worker.close()


async def test_the_first_token_does_not_wait_for_the_step_of_the_others() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    job = bench.submit(job_of("a", 5))
    puppet.gate.release()
    assert isinstance(await asyncio.wait_for(job.items.get(), 10), Delta)
    assert puppet.calls == ["start a"]
    puppet.gate.release(20)
    bench.worker.close()


async def test_one_hand_over_for_all_jobs_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    loop, calls = asyncio.get_running_loop(), []
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(len(args[1])), original(*args))[1])
    jobs = [bench.submit(job_of(name, 9)) for name in "abc"]
    puppet.gate.release(30)
    await asyncio.gather(*(read(job) for job in jobs))
    assert calls[:6] == [1, 1, 1, 1, 2, 3]
    bench.worker.close()


async def test_what_jobs_hold_together_is_bounded_and_nobody_overtakes() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet, max_tokens=20)
    big, huge, small = (
        bench.submit(job_of("a", 9, room=1)),
        bench.submit(job_of("b", 15, room=5)),
        bench.submit(job_of("c", 2)),
    )
    puppet.gate.release(100)
    await asyncio.gather(read(big), read(huge), read(small))
    starts = [call for call in puppet.calls if call.startswith(("start", "release"))]
    assert starts == ["start a", "release a", "start b", "release b", "start c", "release c"]
    bench.worker.close()


async def test_priority_goes_first_into_a_free_place() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet, max_running=1)
    first = bench.submit(job_of("a", 2))
    await asyncio.sleep(0.02)
    low, high = bench.submit(job_of("b", 2, Priority.LOW)), bench.submit(job_of("c", 2, Priority.HIGH))
    puppet.gate.release(100)
    await asyncio.gather(read(first), read(low), read(high))
    assert [call for call in puppet.calls if "start" in call] == ["start a", "start c", "start b"]
    bench.worker.close()


async def test_a_decoder_that_serves_one_at_a_time_gets_one_at_a_time() -> None:
    puppet = Puppet()
    puppet.places = 1
    bench = Bench(puppet)
    jobs = [bench.submit(job_of(name, 2)) for name in "ab"]
    await asyncio.gather(*(read(job) for job in jobs))
    assert [call for call in puppet.calls if "advance" in call] == ["advance a", "advance b"]
    bench.worker.close()


async def test_an_end_token_and_a_stop_string_end_a_reply() -> None:
    puppet = Puppet()
    puppet.end_at = 2
    bench = Bench(puppet)
    items = await read(bench.submit(job_of("a", 9)))
    assert text_of(items) == "t0 t1 "
    finish = items[-1]
    assert isinstance(finish, Finish)
    assert (finish.reason, finish.usage.completion_tokens, finish.stop) == (FinishReason.STOP, 3, None)
    items = await read(bench.submit(job_of("b", 9, stop="1")))
    finish = items[-1]
    assert isinstance(finish, Finish)
    assert (text_of(items), finish.reason, finish.stop, finish.usage.completion_tokens) == (
        "t0 t",
        FinishReason.STOP,
        "1",
        2,
    )
    bench.worker.close()


async def test_a_fault_of_one_is_not_the_others() -> None:
    puppet = Puppet(free=False)
    puppet.faults = {
        "b": RuntimeError("index out of range"),
        "start c": ValueError("bad"),
        "start d": InvalidInput("No."),
    }
    bench = Bench(puppet)
    jobs = {name: bench.submit(job_of(name, 4)) for name in "abcd"}
    puppet.gate.release(100)
    found = {name: (await read(job))[-1] for name, job in jobs.items()}
    assert isinstance(found["a"], Finish)
    assert isinstance(found["b"], GenerationFailed) and "index" not in found["b"].message
    assert isinstance(found["c"], GenerationFailed)
    assert isinstance(found["d"], InvalidInput)
    now = bench.ledger.snapshot()
    assert (now.finished, now.failed, now.running) == (1, 3, 0)
    assert "release b" in puppet.calls
    bench.worker.close()


async def test_a_step_that_fails_whole_ends_its_jobs_and_the_engine_lives() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    puppet.broken = RuntimeError("can't allocate memory")
    a, b = bench.submit(job_of("a")), bench.submit(job_of("b"))
    puppet.gate.release(4)
    codes = [item.code for item in [(await read(a))[-1], (await read(b))[-1]] if isinstance(item, RotundaError)]
    assert codes == ["MEMORY_EXCEEDED", "MEMORY_EXCEEDED"]
    puppet.broken = None
    puppet.gate.release(100)
    assert isinstance((await read(bench.submit(job_of("c"))))[-1], Finish)
    bench.worker.check_health()
    bench.worker.close()


async def test_passes_that_fail_one_after_the_other_make_the_engine_unhealthy() -> None:
    puppet = Puppet()
    bench = Bench(puppet)
    for _ in range(2):
        puppet.broken = RuntimeError("device lost")
        for _ in range(2):
            bench.worker.check_health()
            assert isinstance((await read(bench.submit(job_of("a"))))[-1], GenerationFailed)
        puppet.broken = None
        assert isinstance((await read(bench.submit(job_of("b"))))[-1], Finish)  # one that works clears the count
    puppet.broken = RuntimeError("device lost")
    for _ in range(3):
        await read(bench.submit(job_of("c")))
    with pytest.raises(ProviderUnavailable, match="again and again"):
        bench.worker.submit(job_of("d"))
    bench.worker.close()


async def test_those_who_run_go_on_while_a_prompt_is_read_in_parts() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    puppet.parts["b"] = 3
    a = bench.submit(job_of("a", 9))
    puppet.gate.release(2)
    await until_calls(puppet, 2)
    b = bench.submit(job_of("b", 2))
    puppet.gate.release(100)
    assert text_of(await read(a)) == "t0 t1 t2 t3 t4 t5 t6 t7 t8 "
    assert text_of(await read(b)) == "t0 t1 "
    calls = "; ".join(puppet.calls)
    assert "start b; advance a; start b; advance a; start b; advance a; advance a b" in calls
    bench.worker.close()


async def test_a_job_cancelled_while_its_prompt_is_read_leaves_at_once() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    puppet.parts["a"] = 50
    job = bench.submit(job_of("a", 5))
    puppet.gate.release(2)
    await until_calls(puppet, 2)
    bench.worker.cancel(job)
    puppet.gate.release(1)
    await until_calls(puppet, 4)
    assert puppet.calls == ["start a", "start a", "start a", "release a"]
    now = bench.ledger.snapshot()
    assert (now.cancelled, now.running, now.completion_tokens) == (1, 0, 0)
    bench.worker.close()


async def test_a_cancelled_job_stops_within_the_step_it_is_in() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet)
    job = bench.submit(job_of("a", 50))
    puppet.gate.release(3)
    await until_calls(puppet, 3)
    await asyncio.sleep(0.02)  # the fourth step has begun
    bench.worker.cancel(job)
    bench.worker.cancel(job)
    puppet.gate.release(100)
    await until_calls(puppet, 5)
    assert puppet.calls == ["start a", "advance a", "advance a", "advance a", "release a"]
    bench.worker.close()
    now = bench.ledger.snapshot()
    assert (now.cancelled, now.running, now.completion_tokens, now.tokens_after_cancel) == (1, 0, 4, 1)


async def test_close_ends_all_and_refuses_more() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet, max_running=1)
    running, waiting = bench.submit(job_of("a", 50)), bench.submit(job_of("b", 50))
    puppet.gate.release(2)
    await until_calls(puppet, 2)
    closing = asyncio.create_task(asyncio.to_thread(bench.worker.close))
    await asyncio.sleep(0.02)
    puppet.gate.release(1)
    await closing
    for job in (running, waiting):
        error = (await read(job))[-1]
        assert isinstance(error, ProviderUnavailable) and error.retryable
    with pytest.raises(ProviderUnavailable):
        bench.worker.submit(job_of("c"))
    assert bench.ledger.snapshot().failed == 2


async def test_a_lost_thread_says_so() -> None:
    puppet = Puppet()
    puppet.release = lambda job: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    bench = Bench(puppet)
    job = bench.submit(job_of("a", 2))
    other = bench.submit(job_of("b", 2))
    assert isinstance((await read(job))[-1], RotundaError)
    assert isinstance((await read(other))[-1], RotundaError)
    with pytest.raises(Internal):
        bench.worker.check_health()
    bench.worker.close()


async def test_a_step_that_never_ends_makes_the_engine_unhealthy() -> None:
    puppet = Puppet(free=False)
    bench = Bench(puppet, stall_s=0.01)
    bench.worker.check_health()
    job = bench.submit(job_of("a", 1))
    await asyncio.sleep(0.05)
    with pytest.raises(ProviderUnavailable):
        bench.worker.check_health()
    puppet.gate.release(100)
    await read(job)
    await asyncio.sleep(0.02)
    bench.worker.check_health()
    bench.worker.close()


async def test_a_closed_event_loop_does_not_stop_the_worker() -> None:
    puppet = Puppet()
    bench = Bench(puppet)
    gone = asyncio.new_event_loop()
    gone.close()
    lost = job_of("a", 3)
    lost.loop = gone
    bench.submit(lost)
    assert isinstance((await read(bench.submit(job_of("b"))))[-1], Finish)
    bench.worker.close()
