"""Requests in the slots: reuse, faults, cancellation, long prompts, and a soak."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from serve_app.domain.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    MemoryExceeded,
    ProviderUnavailable,
    RotundaError,
)
from serve_app.domain.generation import Delta, Finish, GenerationRequest, Image, Message, Options
from serve_app.engines import slots
from serve_app.engines.pace import BURST, MAX_CHUNK, MIN_CHUNK, Pace
from serve_app.engines.sampling import Sampler
from serve_app.engines.slots import SlotDecoder
from serve_app.engines.transformers import TransformersEngine
from tests.engine import tiny_models
from tests.pictures import encoded, photo

Make = Callable[..., Awaitable[TransformersEngine]]
Ask = Callable[..., Awaitable[Any]]
Together = Callable[..., Awaitable[list[Any]]]
SOAK = int(os.environ.get("ROTUNDA_SOAK_REQUESTS", "300"))
MAX_GROWTH = 24 * 1024 * 1024
"""Bytes that the process may come to hold after the warm-up, whatever the number of requests."""


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def decoder_of(engine: TransformersEngine) -> SlotDecoder:
    decoder = engine._worker._decoder
    assert isinstance(decoder, SlotDecoder)
    return decoder


def held_rows(engine: TransformersEngine) -> int:
    return sum(row.held for row in decoder_of(engine).loop.rows.by_index)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends no reply by itself."""
    return tiny_models.save_causal(tmp_path_factory.mktemp("store") / "endless", eos_token_id=None)


async def test_a_text_model_gets_the_slots_and_says_so(make_engine: Make) -> None:
    assert (
        "continuous batching (3 at once, 512 tokens each)" in (await make_engine("chat", max_concurrency=3)).description
    )


async def test_all_that_run_share_one_pass_per_step(make_engine: Make, ask: Ask, endless: Path) -> None:
    engine = await make_engine(endless, max_concurrency=4)
    sizes: list[int] = []
    loop = decoder_of(engine).loop
    forward, replay = loop._forward, loop._replay

    def computed(line: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(line))
        return forward(line, *args, **kwargs)

    def replayed(steps: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        found = replay(steps, *args, **kwargs)
        sizes.extend([len(steps)] if found is not None else [])
        return found

    loop._forward, loop._replay = computed, replayed  # type: ignore[method-assign]
    await asyncio.gather(*(ask(engine, f"Hello {n}", max_tokens=30) for n in range(4)))
    assert sizes.count(4) >= 20 and len(sizes) < 60


async def test_the_next_turn_reads_only_what_is_new(make_engine: Make, ask: Ask, endless: Path) -> None:
    engine = await make_engine(endless)
    question = "The quick brown fox jumps over the lazy dog. " * 3
    first = await ask(engine, question, max_tokens=20)
    assert first.finish.usage.cached_tokens == 0
    turns = (question, Message.of("assistant", first.text), "And then?")
    second = await ask(engine, *turns, max_tokens=20)
    assert second.finish.usage.cached_tokens > 0.8 * first.finish.usage.prompt_tokens
    fresh = await make_engine(endless)
    assert (await ask(fresh, *turns, max_tokens=20)).text == second.text


async def test_a_common_system_prompt_is_read_once_even_by_those_who_come_together(
    make_engine: Make, ask: Ask, endless: Path
) -> None:
    engine = await make_engine(endless, max_concurrency=4)
    system = Message.of("system", "The quick brown fox jumps over the lazy dog. " * 6)
    replies = await asyncio.gather(*(ask(engine, system, f"{n} is my number") for n in range(4)))
    cached = sorted(reply.finish.usage.cached_tokens for reply in replies)
    assert cached[0] == 0 and cached[1] > 100
    fresh = await make_engine(endless, max_concurrency=4)
    for n, reply in enumerate(replies):
        assert (await ask(fresh, system, f"{n} is my number")).text == reply.text


async def test_what_was_read_with_an_image_is_never_reused(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("vision")
    assert "continuous batching" in engine.description
    picture = Message.of("user", "What is this?", (Image("image/png", encoded("PNG")),))
    for _ in range(2):
        assert (await ask(engine, picture)).finish.usage.cached_tokens == 0
    both = await asyncio.gather(ask(engine, picture), ask(engine, "Hello"), ask(engine, picture))
    assert [reply.finish.usage.completion_tokens > 0 for reply in both] == [True] * 3
    assert held_rows(engine) == 0


@pytest.mark.parametrize("save", [tiny_models.save_llava, tiny_models.save_idefics])
async def test_replies_about_pictures_share_the_steps_of_the_others(
    save: Callable[..., Path], tmp_path: Path, make_engine: Make, ask: Ask, together: Together
) -> None:
    engine = await make_engine(save(tmp_path / "m"), max_concurrency=8)
    asked = [Message.of("user", f"What is this, {n}?", (Image("image/png", photo("PNG")),)) for n in range(3)]
    alone = [(await ask(engine, message, max_tokens=40)).ids for message in (*asked, "Hello")]
    loop, sizes = decoder_of(engine).loop, []
    original = loop.run

    def run(feeds: Any) -> torch.Tensor:
        sizes.append(len(feeds))
        return original(feeds)

    loop.run = run  # type: ignore[method-assign]
    replies = await together(engine, *(ask(engine, message, max_tokens=40) for message in (*asked, "Hello")))
    assert [reply.ids for reply in replies] == alone
    assert max(sizes) == 4


async def test_memory_for_what_is_kept_is_bounded(make_engine: Make, ask: Ask, endless: Path) -> None:
    engine = await make_engine(endless, max_concurrency=2, extra=(("kv_tokens", 600),))
    for n in range(12):
        await ask(engine, f"{n} " * 60, max_tokens=10)
        assert sum(row.occupied for row in decoder_of(engine).loop.rows.by_index) <= 600


async def test_a_request_too_long_for_a_row_is_refused_before_it_starts(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat")
    decoder_of(engine).loop.limit = 50
    with pytest.raises(ContextLengthExceeded):
        await ask(engine, "Hello " * 30)
    assert held_rows(engine) == 0


async def test_sampling_that_fails_ends_only_its_request(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await make_engine(endless, max_concurrency=4)
    alone = await ask(engine, "Hello", max_tokens=30)
    original = Sampler.pick

    def pick(self: Sampler, logits: torch.Tensor, ids: Any) -> int:
        if self._seed == 666:
            raise RuntimeError("index out of range")
        return original(self, logits, ids)

    monkeypatch.setattr(Sampler, "pick", pick)
    good = [asyncio.create_task(ask(engine, "Hello", max_tokens=30)) for _ in range(3)]
    for _ in range(4):
        with pytest.raises(GenerationFailed):
            await ask(engine, "Hello", temperature=1.0, seed=666)
    assert [(await task).text for task in good] == [alone.text] * 3
    engine.check_health()
    assert held_rows(engine) == 0


async def test_a_pass_that_fails_ends_all_and_the_engine_goes_on(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await make_engine(endless, max_concurrency=4)
    alone = await ask(engine, "Hello", max_tokens=30)
    loop = decoder_of(engine).loop
    run = loop.run

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    for failures in range(3):
        tasks = [asyncio.create_task(ask(engine, f"Hello {n}", max_tokens=200)) for n in range(3)]
        await until(lambda: engine.counters().running == 3)
        monkeypatch.setattr(loop, "run", broken)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, RotundaError) for outcome in outcomes)
        monkeypatch.setattr(loop, "run", run)
        assert held_rows(engine) == 0
        if failures < 2:
            assert (await ask(engine, "Hello", max_tokens=30)).text == alone.text
            engine.check_health()


async def test_passes_that_fail_again_and_again_show_in_the_health_check(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await make_engine(endless)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setattr(decoder_of(engine).loop, "run", broken)
    for _ in range(3):
        engine.check_health()
        with pytest.raises(GenerationFailed):
            await ask(engine, "Hello")
    with pytest.raises(ProviderUnavailable, match="again and again"):
        engine.check_health()


async def test_a_long_prompt_is_read_beside_running_streams_and_can_be_cancelled(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "allowance", lambda self, running, reading: 8)
    engine = await make_engine(endless, max_concurrency=2)
    loop = decoder_of(engine).loop
    passes: list[list[int]] = []
    original = loop.run

    def noted(feeds: Any) -> torch.Tensor:
        passes.append([len(feed.tokens) for feed in feeds])
        return original(feeds)

    monkeypatch.setattr(loop, "run", noted)
    running = asyncio.create_task(ask(engine, "Hello", max_tokens=250))
    await until(lambda: engine.counters().completion_tokens > 3)
    passes.clear()
    await ask(engine, "0 1 2 3 4 5 6 7 8 9 " * 8, max_tokens=2)
    reading = [sizes for sizes in passes if max(sizes) > 1]
    assert len(reading) > 10 and all(sizes[0] == 1 and sizes[1] <= 8 for sizes in reading)  # with a step of the other

    doomed = asyncio.create_task(ask(engine, "9 8 7 6 5 4 3 2 1 0 " * 8, max_tokens=2))
    await until(lambda: held_rows(engine) == 2)
    doomed.cancel()
    await asyncio.wait({doomed})
    await until(lambda: held_rows(engine) == 1)
    assert (await running).finish.usage.completion_tokens == 250
    now = engine.counters()
    assert (now.cancelled, now.finished, now.running) == (1, 2, 0)


async def test_a_stream_that_ends_while_another_prompt_is_read_ends_nobody_else(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "allowance", lambda self, running, reading: 8)
    engine = await make_engine(endless, max_concurrency=3)
    short = asyncio.create_task(ask(engine, "Hello", max_tokens=6))
    await until(lambda: engine.counters().completion_tokens > 1)
    beside = await ask(engine, "0 1 2 3 4 5 6 7 8 9 " * 8, max_tokens=3)
    assert ((await short).finish.usage.completion_tokens, beside.finish.usage.completion_tokens) == (6, 3)
    now = engine.counters()
    assert (now.failed, now.finished, now.running) == (0, 2, 0)


async def test_an_idle_engine_reads_a_prompt_in_one_pass(make_engine: Make, ask: Ask, endless: Path) -> None:
    engine = await make_engine(endless)
    loop = decoder_of(engine).loop
    sizes: list[int] = []
    original = loop.run

    def run(feeds: Any) -> torch.Tensor:
        sizes.extend(len(feed.tokens) for feed in feeds if len(feed.tokens) > 1)
        return original(feeds)

    loop.run = run  # type: ignore[method-assign]
    for digit in "12":
        reply = await ask(engine, f"{digit} " * 100)
        assert sizes.pop() > 190 and not sizes and reply.finish.usage.cached_tokens < 10


async def test_batch_tokens_are_the_most_of_prompts_in_a_pass(make_engine: Make, ask: Ask, endless: Path) -> None:
    usual, narrow = await make_engine(endless), await make_engine(endless, extra=(("batch_tokens", 64),))
    loop = decoder_of(narrow).loop
    sizes: list[int] = []
    original = loop.run

    def run(feeds: Any) -> torch.Tensor:
        sizes.append(sum(len(feed.tokens) for feed in feeds))
        return original(feeds)

    loop.run = run  # type: ignore[method-assign]
    one, other = [await ask(engine, "1 " * 100) for engine in (usual, narrow)]
    assert other.text == one.text and sum(sizes) > 190
    assert sizes[:3] == [64, 64, 64] and max(sizes) == 64


async def test_a_short_prompt_does_not_wait_for_a_long_one(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "allowance", lambda self, running, reading: 16)
    engine = await make_engine(endless, max_concurrency=3)
    done: list[str] = []

    async def run(name: str, text: str) -> None:
        await ask(engine, text, max_tokens=1)
        done.append(name)

    await asyncio.gather(run("long", "0 1 2 3 4 5 6 7 8 9 " * 15), run("short", "Hello"))
    assert done == ["short", "long"]


def test_the_pace_lets_running_streams_wait_no_longer_than_a_step() -> None:
    pace = Pace()
    assert pace.allowance(running=4, reading=1) == MAX_CHUNK
    for _ in range(50):
        pace.passed(steps=4, tokens=0, seconds=0.010)
        pace.passed(steps=4, tokens=100, seconds=0.020)
    assert pace.allowance(running=4, reading=1) == 48
    assert pace.allowance(running=4, reading=8) == 240
    assert pace.allowance(running=0, reading=1) == MAX_CHUNK
    for _ in range(50):
        pace.passed(steps=0, tokens=10, seconds=0.050)
    assert pace.allowance(running=4, reading=1) == MIN_CHUNK


def test_a_burst_is_read_at_once_where_that_takes_no_longer_than_half_a_second() -> None:
    pace = Pace(MAX_CHUNK, BURST)
    assert pace.allowance(running=0, reading=32) == MAX_CHUNK  # nobody knows yet how long it takes
    pace.passed(steps=0, tokens=512, seconds=0.128)
    assert pace.allowance(running=0, reading=32) == 2000
    pace.passed(steps=0, tokens=16, seconds=0.016)  # so few tell nothing of many
    pace.passed(steps=8, tokens=512, seconds=2.0)  # nor does what also had steps
    assert pace.allowance(running=0, reading=32) == 2000
    for _ in range(20):
        pace.passed(steps=0, tokens=512, seconds=0.010)
    assert pace.allowance(running=0, reading=32) == BURST
    assert pace.allowance(running=1, reading=1) <= MAX_CHUNK
    for _ in range(40):
        pace.passed(steps=0, tokens=512, seconds=4.0)
    assert pace.allowance(running=0, reading=32) == MAX_CHUNK
    limited = Pace(256)
    limited.passed(steps=0, tokens=512, seconds=0.010)
    assert limited.allowance(running=0, reading=32) == 256


def test_a_pass_reads_no_less_than_what_takes_as_long() -> None:
    pace = Pace(4096)
    pace.least = 256
    for _ in range(50):
        pace.passed(steps=8, tokens=0, seconds=0.004)
        pace.passed(steps=8, tokens=64, seconds=0.008)
    assert pace.allowance(running=8, reading=1) == 256


def test_where_a_pass_costs_the_same_however_long_prompts_are_read_whole() -> None:
    pace = Pace(4096)
    pace.passed(steps=0, tokens=100, seconds=0.030)  # the first seems dear: it holds what every pass costs
    for noise in (0.004, -0.004) * 10:
        pace.passed(steps=8, tokens=0, seconds=0.030)
        pace.passed(steps=8, tokens=16, seconds=0.030 + noise)
    assert pace.allowance(running=8, reading=1) > 1000


async def test_a_prompt_that_breaks_a_pass_does_not_end_the_running_streams(
    make_engine: Make, ask: Ask, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await make_engine(endless, max_concurrency=4)
    alone = await ask(engine, "Hello", max_tokens=120)
    loop = decoder_of(engine).loop
    original = loop.run

    def run(feeds: Any) -> torch.Tensor:
        if any(len(feed.tokens) > 1 and len(feed.seat.ids) > 300 for feed in feeds):
            raise RuntimeError("not enough memory")
        return original(feeds)

    monkeypatch.setattr(loop, "run", run)
    good = [asyncio.create_task(ask(engine, "Hello", max_tokens=120)) for _ in range(3)]
    await until(lambda: engine.counters().running == 3)
    with pytest.raises(MemoryExceeded):
        await ask(engine, "5 6 7 " * 60)
    assert not any(task.done() for task in good)
    assert [(await task).text for task in good] == [alone.text] * 3
    assert held_rows(engine) == 0


async def test_seeds_repeat_in_the_same_company(make_engine: Make, ask: Ask, endless: Path) -> None:
    async def together() -> list[str]:
        engine = await make_engine(endless, max_concurrency=4)
        asked = (ask(engine, f"Hello {n}", temperature=1.2, seed=n, max_tokens=20) for n in range(4))
        return [reply.text for reply in await asyncio.gather(*asked)]

    first = await together()
    assert await together() == first and len(set(first)) == 4


async def test_a_soak_leaks_no_row_and_its_counters_add_up(make_engine: Make, endless: Path) -> None:
    """20 % are cancelled at some token, 5 % are bad; ``ROTUNDA_SOAK_REQUESTS=10000`` for the long one."""
    engine = await make_engine(endless, max_concurrency=8, max_queue=64, extra=(("kv_tokens", 2048),))
    rng = random.Random(5)
    places = asyncio.Semaphore(24)
    found = {"finished": 0, "cancelled": 0, "failed": 0}

    async def one(number: int) -> None:
        fate, text = rng.random(), "The quick brown fox. " * rng.randint(0, 12) + str(rng.randint(0, 9) ** 5)
        options = Options(
            temperature=rng.choice([0.0, 0.0, 1.1]), seed=number, max_tokens=rng.randint(1, 24), stop=("zz",)
        )
        messages = (Message.of("user", text if fate > 0.05 else "word " * 900),)
        leave_at = rng.randint(0, 8) if 0.05 < fate < 0.25 else 10**6
        stream = engine.generate(GenerationRequest(str(number), "m", messages, options))
        async with places:
            try:
                deltas = 0
                async for item in stream:
                    deltas += isinstance(item, Delta)
                    if deltas >= leave_at and not isinstance(item, Finish):
                        found["cancelled"] += 1
                        return
                found["finished"] += 1
            except RotundaError:
                found["failed"] += 1
            finally:
                await stream.aclose()

    warm = SOAK // 3  # by then every row and every size of pass has been used
    await asyncio.gather(*(one(number) for number in range(warm)))
    before = resident_bytes()
    await asyncio.gather(*(one(number) for number in range(warm, SOAK)))
    await until(lambda: engine.counters().running == 0)
    now = engine.counters()
    assert now.requests == SOAK == now.finished + now.cancelled + now.failed
    # One that is left while its last token is under way may have finished.
    assert now.failed == found["failed"] and now.finished >= found["finished"]
    assert now.tokens_after_cancel <= now.cancelled
    rows = decoder_of(engine).loop.rows
    assert held_rows(engine) == 0 and len({row.index for row in rows.by_index}) == len(rows.by_index)
    assert sum(row.occupied for row in rows.by_index) <= 2048
    if decoder_of(engine).loop.on_cpu:  # on a GPU all rows together hold no more than the budget
        assert len(rows.by_index) == slots.KEPT_ROWS + 8
    assert resident_bytes() - before < MAX_GROWTH
