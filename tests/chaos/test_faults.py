"""Faults during load, each followed by the same questions: was anything lost, told twice, left open; is all well again?

Not part of ``make test``: ``make chaos`` runs it, on a cluster of its own. Every fault says within how many seconds the
cluster must serve as before.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.wire import Target
from tests.chaos.load import Client, clients, load
from tests.chaos.scene import (
    MODEL,
    PACE,
    RATE,
    TOKENS,
    assert_sound,
    kill,
    named,
    normal,
    replica,
    running_load,
)
from tests.cluster import Cluster, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.own_cluster, pytest.mark.timeout(600)]


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


@pytest.mark.parametrize("mode", ["drop", "lie", "garbage"])
def test_an_upstream_that_breaks_off_ends_its_streams_truthfully(chaos: Cluster, mode: str) -> None:
    wait_until(lambda: _trusted(chaos), 90, 1.0, "the upstream to be asked again after what it did before")
    asking = [Client(f"please {mode} {os.getpid()} {number}", "bad/bad", 16) for number in range(6)]
    asyncio.run(load(Target.of(chaos.url), asking, 20))
    assert_sound(chaos, asking)
    assert {client.told.terminals[0].name for client in asking} == {"error"}


def test_an_upstream_that_hangs_can_be_left(chaos: Cluster) -> None:
    wait_until(lambda: _trusted(chaos), 90, 1.0, "the upstream to be asked again after what it did before")
    asking = [Client(f"please hang {os.getpid()} {number}", "bad/bad", 16, leave_after_s=3) for number in range(4)]
    asyncio.run(load(Target.of(chaos.url), asking, 20))
    for client in asking:
        opened: dict[str, Any] = client.told.first("session") or {}
        body = {"sessionId": opened["sessionId"], "conversationId": opened["conversationId"]}
        assert httpx.post(f"{chaos.url}/api/terminate-stream", json=body, timeout=30).json()["success"]
    assert_sound(chaos, asking)


def _trusted(cluster: Cluster) -> bool:
    """Whether every ingress asks the upstream, and gets answers when it asks nicely: each has a circuit breaker."""
    body = {"model": "bad/bad", "prompt": "well?", "max_tokens": 3}
    answers = [httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30) for _ in range(8)]
    return all(answer.status_code == 200 for answer in answers)
