"""What the fault tests share: the model, its load, a fault in the middle of it, and what must hold after it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from benchmarks.wire import Target
from tests.chaos.checker import Kept, check
from tests.chaos.load import Client, load
from tests.cluster import Cluster, wait_until

MODEL, SLOTS, PACE, TOKENS = "test/chaos", 8, 0.02, 100
RATE = SLOTS / (PACE * TOKENS)
"""Half of what two replicas can serve, in requests per second."""
SETTLE_S = 90.0


def database(cluster: Cluster) -> Path:
    return cluster.home / "disk" / "chaos.db"


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
