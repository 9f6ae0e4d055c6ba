import asyncio
import time

import pytest

from serve_app.watchdog import Watchdog


async def test_a_wait_in_time_gives_its_result_and_a_late_one_is_cut() -> None:
    dog = Watchdog()
    assert await dog.wait(asyncio.sleep(0, "value"), 1) == "value"
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        await dog.wait(asyncio.sleep(30), 0.05)
    assert time.monotonic() - started < 5
    assert await dog.wait(asyncio.sleep(0, "again"), 1) == "again"
    dog.close()


async def test_each_wait_has_its_own_limit_however_long_the_pauses_between_them() -> None:
    dog = Watchdog()
    for _ in range(3):
        await dog.wait(asyncio.sleep(0.03), 0.3)
        await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError):
        await dog.wait(asyncio.Event().wait(), 0.02)  # shorter than the ones before it
    dog.close()


async def test_a_timer_that_fires_between_two_waits_harms_nobody() -> None:
    dog = Watchdog()
    await dog.wait(asyncio.sleep(0), 0.01)
    await asyncio.sleep(0.05)
    assert await dog.wait(asyncio.sleep(0.05, "fine"), 1) == "fine"
    dog.close()


async def test_somebody_elses_cancel_stays_a_cancel() -> None:
    dog = Watchdog()
    task = asyncio.ensure_future(dog.wait(asyncio.sleep(30), 10))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    dog.close()


async def test_many_waits_share_one_timer() -> None:
    dog = Watchdog()
    armed = 0
    real = dog._arm

    def counting(at: float) -> None:
        nonlocal armed
        armed += 1
        real(at)

    dog._arm = counting  # type: ignore[method-assign]
    for _ in range(1000):
        await dog.wait(asyncio.sleep(0), 10)
    assert armed == 1
    dog.close()
