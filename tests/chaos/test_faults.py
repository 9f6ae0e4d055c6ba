"""Faults during load, each followed by the same questions: was anything lost, told twice, left open; is all well again?

Not part of ``make test``: ``make chaos`` runs it, on a cluster of its own. Every fault says within how many seconds the
cluster must serve as before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.wire import Target
from tests.chaos.checker import Kept, check
from tests.chaos.load import Client, clients, load
from tests.chaos.upstream import BadUpstream
from tests.cluster import Cluster, model_application, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.own_cluster, pytest.mark.timeout(600)]

MODEL, SLOTS, PACE, TOKENS = "test/chaos", 8, 0.02, 100
RATE = SLOTS / (PACE * TOKENS)
"""Half of what two replicas can serve, in requests per second."""
SETTLE_S = 90.0


@pytest.fixture(scope="module")
def upstream() -> Iterator[BadUpstream]:
    with BadUpstream() as made:
        yield made


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, upstream: BadUpstream) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("chaos")
    args = {"provider": "bad", "kind": "openai", "base_url": upstream.url}
    applications = [
        model_application(
            "model-chaos", model=MODEL, engine="scripted", min_replicas=2, max_replicas=2, max_concurrency=SLOTS,
            max_queue=SLOTS, options={"pace": PACE, "tokens": 1_000_000},
        ),
        {"name": "upstream-bad", "route_prefix": None, "import_path": "deployments.upstream:build", "args": args},
    ]  # fmt: skip
    environment = {"DATABASE_URL": f"sqlite+aiosqlite:///{home / 'chaos.db'}"}
    made = Cluster(home, applications, environment).start()
    try:
        wait_until(lambda: normal(made), SETTLE_S, 1.0, "the first replies")
        yield made
    finally:
        made.stop()


def database(cluster: Cluster) -> Path:
    return cluster.home / "chaos.db"


def replica(cluster: Cluster, deployment: str) -> psutil.Process:
    """A running replica's process, by the title that Ray gives it."""
    found = [process for process in cluster.processes() if f"ServeReplica:{deployment}" in " ".join(process.cmdline())]
    assert found, f"no process of {deployment}"
    return found[0]


def named(cluster: Cluster, word: str) -> psutil.Process:
    found = [process for process in cluster.processes() if word in " ".join(process.cmdline())]
    assert found, f"no process with {word}"
    return found[-1]


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


def normal(cluster: Cluster) -> bool:
    """Whether five requests in a row are answered whole."""
    try:
        body = {"model": MODEL, "prompt": "well?", "max_tokens": 3}
        answers = [httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=10) for _ in range(5)]
        return all(answer.status_code == 200 for answer in answers)
    except httpx.HTTPError:
        return False


def running_load(cluster: Cluster, asking: list[Client], rate: float, fault: Callable[[], None], at_s: float) -> float:
    """Run the load, do the fault after ``at_s`` seconds; the seconds from the fault until all was well."""
    target = Target.of(cluster.url)
    well: list[float] = []

    def disturb() -> None:
        time.sleep(at_s)
        fault()
        begun = time.monotonic()
        while not normal(cluster):
            time.sleep(0.1)
        well.append(time.monotonic() - begun)

    beside = threading.Thread(target=disturb)
    beside.start()
    asyncio.run(load(target, asking, rate))
    beside.join(SETTLE_S)
    assert well, f"not well {SETTLE_S:g} s after the fault"
    return well[0]


def assert_sound(cluster: Cluster, asking: list[Client]) -> None:
    """Nothing runs any more, and no rule is broken."""
    wait_until(lambda: not open_sessions(cluster), SETTLE_S, 0.5, "every session to end")
    wait_until(lambda: idle(cluster), SETTLE_S, 0.5, "no lease or slot to be held")
    found = check((client.told for client in asking), Kept.read(database(cluster)))
    assert found == [], "\n".join(map(str, found[:20]))


def open_sessions(cluster: Cluster) -> list[str]:
    return [row[0] for row in Kept.read(database(cluster)).sessions if row[2] == "ACTIVE"]


def idle(cluster: Cluster) -> bool:
    try:
        shown = cluster.model(MODEL)
        return bool(shown["running"] == 0 and shown["waiting"] == 0 and shown["replicas"] == 2)
    except httpx.HTTPError:
        return False


@dataclass(frozen=True)
class Killing:
    """Whom to kill, within how many seconds all must be well, and how many may fail before their first byte."""

    victim: Callable[[Cluster], psutil.Process]
    well_within_s: float
    unseen: bool = False


KILLINGS = {
    "replica": Killing(lambda cluster: replica(cluster, "model-chaos"), 15, unseen=True),
    "router": Killing(lambda cluster: replica(cluster, "gateway:router"), 20, unseen=True),
    "ingress": Killing(lambda cluster: replica(cluster, "gateway:ingress"), 20),
    "controller": Killing(lambda cluster: named(cluster, "ServeController"), 30),
    "haproxy": Killing(lambda cluster: named(cluster, "haproxy"), 30),
}


@pytest.mark.parametrize("name", KILLINGS)
def test_killing(chaos: Cluster, name: str) -> None:
    killing = KILLINGS[name]
    asking = clients(40, MODEL, TOKENS, f"kill {name}")
    took = running_load(chaos, asking, RATE, lambda: kill(killing.victim(chaos)), at_s=3)
    assert_sound(chaos, asking)
    assert took <= killing.well_within_s
    if killing.unseen:
        assert sum(client.failed_before_first_byte for client in asking) == 0
    ended = [client.told.terminals[0].name for client in asking if client.told.terminals]
    assert len(ended) == len(asking), f"{len(asking) - len(ended)} of {len(asking)} clients never got an end"


def test_clients_that_vanish_leave_nothing_behind(chaos: Cluster) -> None:
    asking = [*clients(12, MODEL, TOKENS, "vanish", leave_after_s=0.7), *clients(8, MODEL, TOKENS, "stay")]
    asyncio.run(load(Target.of(chaos.url), asking, RATE))
    assert_sound(chaos, asking)


def test_slow_readers_slow_nobody_else_down(chaos: Cluster) -> None:
    slow, quick = clients(4, MODEL, TOKENS, "slow", slow_s=0.3), clients(8, MODEL, TOKENS, "quick")
    asyncio.run(load(Target.of(chaos.url), [*slow, *quick], RATE, together=True))
    assert_sound(chaos, [*slow, *quick])
    assert max(client.ended - client.begun for client in quick) < 3 * PACE * TOKENS + 5


def test_twice_as_much_as_fits_is_served_or_refused_and_nothing_is_lost(chaos: Cluster) -> None:
    asking = clients(60, MODEL, TOKENS // 2, "overload")
    asyncio.run(load(Target.of(chaos.url), asking, 4 * RATE * 2))
    assert_sound(chaos, asking)
    assert all(client.told.terminals or client.told.refused == "QUEUE_FULL" for client in asking)
    wait_until(lambda: normal(chaos), 10, what="all to be well")


def test_a_locked_store_holds_replies_up_and_loses_none(chaos: Cluster) -> None:
    def lock() -> None:
        with sqlite3.connect(database(chaos), timeout=10, isolation_level=None) as rows:
            rows.execute("BEGIN EXCLUSIVE")
            time.sleep(3)
            rows.execute("ROLLBACK")

    asking = clients(30, MODEL, TOKENS, "lock")
    running_load(chaos, asking, RATE, lock, at_s=2)
    assert_sound(chaos, asking)


@pytest.mark.parametrize("mode", ["drop", "lie", "garbage"])
def test_an_upstream_that_breaks_off_ends_its_streams_truthfully(chaos: Cluster, mode: str) -> None:
    wait_until(lambda: _listed(chaos, "bad/bad"), 30, what="the upstream's model")
    asking = [Client(f"please {mode} {os.getpid()} {number}", "bad/bad", 16) for number in range(6)]
    asyncio.run(load(Target.of(chaos.url), asking, 20))
    assert_sound(chaos, asking)
    assert {client.told.terminals[0].name for client in asking} == {"error"}


def test_an_upstream_that_hangs_can_be_left(chaos: Cluster) -> None:
    wait_until(lambda: _listed(chaos, "bad/bad"), 30, what="the upstream's model")
    asking = [Client(f"please hang {os.getpid()} {number}", "bad/bad", 16, leave_after_s=3) for number in range(4)]
    asyncio.run(load(Target.of(chaos.url), asking, 20))
    for client in asking:
        opened: dict[str, Any] = client.told.first("session") or {}
        body = {"sessionId": opened["sessionId"], "conversationId": opened["conversationId"]}
        assert httpx.post(f"{chaos.url}/api/terminate-stream", json=body, timeout=30).json()["success"]
    assert_sound(chaos, asking)


def _listed(cluster: Cluster, model: str) -> bool:
    return httpx.get(f"{cluster.url}/api/models/{model}", timeout=30).status_code == 200
