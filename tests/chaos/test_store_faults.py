"""A store that is locked, slow or full during load, and a clock that jumps."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.chaos.load import clients
from tests.chaos.scene import MODEL, RATE, TOKENS, assert_sound, database, running_load
from tests.cluster import Cluster, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.own_cluster, pytest.mark.timeout(600)]


@contextlib.contextmanager
def rows_of(cluster: Cluster) -> Iterator[sqlite3.Connection]:
    """The store's file, past the product; every statement is its own transaction."""
    rows = sqlite3.connect(database(cluster), timeout=10, isolation_level=None)
    try:
        yield rows
    finally:
        rows.close()


def disturbed(cluster: Cluster, name: str, fault: Callable[[], None], well_within_s: float) -> None:
    """The fault, two seconds into a load of half of what can be served; then every rule must hold."""
    asking = clients(30, MODEL, TOKENS, name)
    took = running_load(cluster, asking, RATE, fault, at_s=2)
    assert_sound(cluster, asking)
    assert took <= well_within_s
    ended = [client.told.terminals[0].name for client in asking if client.told.terminals]
    assert ended == ["end"] * len(asking)


def test_a_locked_store_holds_replies_up_and_loses_none(chaos: Cluster) -> None:
    def lock() -> None:
        with rows_of(chaos) as rows:
            rows.execute("BEGIN EXCLUSIVE")
            time.sleep(3)
            rows.execute("ROLLBACK")

    disturbed(chaos, "locked", lock, well_within_s=10)


def test_a_slow_store_loses_nothing(chaos: Cluster) -> None:
    """Another writer has the file nine tenths of the time, for six seconds."""

    def hold() -> None:
        ends = time.monotonic() + 6
        with rows_of(chaos) as rows:
            while time.monotonic() < ends:
                rows.execute("BEGIN IMMEDIATE")
                time.sleep(0.27)
                rows.execute("ROLLBACK")
                time.sleep(0.03)

    disturbed(chaos, "slow", hold, well_within_s=10)


def test_a_full_disk_refuses_what_is_new_and_loses_nothing(chaos: Cluster, disk: Path) -> None:
    if not disk.is_mount():
        pytest.skip("only a user who may mount a small file system can fill it")

    def fill() -> None:
        with rows_of(chaos) as rows:
            # A log that is long already would be written again from its start, without asking for room.
            wait_until(lambda: rows.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, 10, 0.01)
            ballast = disk / "ballast"
            try:
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
                wait_until(lambda: refused(chaos), 10, what="a request that cannot be kept to be refused")
                time.sleep(3)
            finally:
                ballast.unlink()

    disturbed(chaos, "full", fill, well_within_s=10)


def refused(cluster: Cluster) -> bool:
    body = {"model": MODEL, "message": "room?", "options": {"maxTokens": 1}}
    answer = httpx.post(f"{cluster.url}/api/stream-message", json=body, timeout=30)
    return answer.status_code == 503 and answer.json()["error"]["code"] == "PROVIDER_UNAVAILABLE"


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_clock_that_jumps_loses_nothing(chaos: Cluster, seconds: int) -> None:
    """Ownership of streams is the one thing that a stored time decides. The database's clock is the machine's, which no
    test may set, so that the times are set back by what the clock would have jumped."""

    def jump() -> None:
        with rows_of(chaos) as rows:
            moved = rows.execute("UPDATE stream_sessions SET owned_until_ms = owned_until_ms - ?", (seconds * 1000,))
            assert moved.rowcount > 0

    disturbed(chaos, f"jump {seconds}", jump, well_within_s=20)
