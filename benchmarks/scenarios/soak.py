"""A moderate load for a long time: does anything grow?

``python -m benchmarks.scenarios.soak --minutes 60``: three scripted models of which two may be in memory (so they
rotate), Zipf arrivals, 15 % of the clients leave half-way, 5 % of the requests fail. Every few seconds the resident
memory and the file descriptors of each process are written down, and the size of the store. Reported: their slopes over
the last two thirds of the time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.arrivals import Planned, zipf_models
from benchmarks.machine import use_of
from benchmarks.protocol import Result, Row, Target, parser
from benchmarks.scenarios.paced import scripted
from benchmarks.servers import Server, rotunda
from benchmarks.stats import bootstrap, slope
from benchmarks.surfaces import events
from benchmarks.wire import Target as Address
from benchmarks.wire import exchange, now

MODELS = ("bench/a", "bench/b", "bench/c")
LEAVE, FAIL = 0.15, 0.05
SHOWN = 12
"""Processes whose memory the plot shows: those that grew most."""
SETTLED = 1 / 3
"""Of the time, at the beginning, that does not count: caches fill and processes start."""


@dataclass(slots=True)
class Diary:
    """What was seen: rows of (seconds, value) by process, of the store, and what became of the requests."""

    rss: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    fds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    store: list[tuple[float, float]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    """What each process is called here: by its first title, since Ray changes titles."""

    def look(self, server: Server, home: Path, at: float) -> None:
        for pid, use in use_of(server.processes()).items():
            # A model's process ends when it rotates out: its number tells it from its successor.
            name = self.names.setdefault(pid, f"{use.name} {pid}")
            self.rss.setdefault(name, []).append((at, float(use.rss)))
            self.fds.setdefault(name, []).append((at, float(use.fds)))
        size = sum(path.stat().st_size for path in home.rglob("*.db*") if path.is_file())
        self.store.append((at, float(size)))

    def told(self, what: str) -> None:
        self.outcomes[what] = self.outcomes.get(what, 0) + 1


async def one(server: Server, planned: Planned, leaves: bool, diary: Diary) -> None:
    address = Address.of(server.url)
    data = server.surface.request(address, planned, None)
    result = await exchange(address, data, 120, leave_after_s=0.5 if leaves else None)
    if leaves:
        diary.told("left" if result.error == "abandoned" else "done before leaving")
        return
    reply = server.surface.read(events(result)) if result.status == 200 else None
    ends = "+".join(reply.terminals) if reply else f"HTTP {result.status}"
    diary.told(result.error or ends or "no terminal event")


async def run(server: Server, home: Path, seconds: float, rate: float, seed: int, every_s: float) -> Diary:
    diary, rng, models, begun = Diary(), random.Random(seed), zipf_models(MODELS, 1.0, seed), now()
    running: set[asyncio.Task[None]] = set()
    looked = -every_s
    for number in count():
        at = now() - begun
        if at >= seconds:
            break
        if at - looked >= every_s:
            looked = at
            await asyncio.to_thread(diary.look, server, home, at)
        drawn = rng.random()
        prompt = f"soak {number}" + (" [[fail_at=10]]" if drawn < FAIL else "")
        leaves = FAIL <= drawn < FAIL + LEAVE
        task = asyncio.create_task(one(server, Planned(0.0, next(models), prompt, 60), leaves, diary))
        running.add(task)
        task.add_done_callback(running.discard)
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*running)
    diary.look(server, home, now() - begun)
    return diary


def settled(series: Mapping[str, list[tuple[float, float]]], seconds: float) -> dict[str, list[tuple[float, float]]]:
    """The processes that lived through all of the time that counts, and what was seen of them in it."""
    from_s = seconds * SETTLED
    lived = {name: rows for name, rows in series.items() if rows[0][0] <= from_s and rows[-1][0] >= seconds * 0.95}
    return {name: [row for row in rows if row[0] >= from_s] for name, rows in lived.items()}


def rows(diary: Diary, seconds: float) -> list[Row]:
    memory = {name: slope(points) * 3600 / 2**20 for name, points in settled(diary.rss, seconds).items()}
    handles = {name: slope(points) * 3600 for name, points in settled(diary.fds, seconds).items()}
    store = slope([point for point in diary.store if point[0] >= seconds * SETTLED])
    replies = sum(diary.outcomes.values())
    wrong = sum(n for what, n in diary.outcomes.items() if what not in ("end", "left", "done before leaving", "error"))
    worst, most = max(memory, key=lambda name: memory[name]), max(handles, key=lambda name: handles[name])
    return [
        Row(f"memory of the process that grew most ({worst.rpartition(' ')[0]})", _one(memory[worst]), "MiB/h"),
        Row("memory of all processes together", _one(sum(memory.values())), "MiB/h"),
        Row(
            f"file descriptors of the process that grew most ({most.rpartition(' ')[0]})", _one(handles[most]), "per h"
        ),
        Row("store per 1,000 requests", _one(store * seconds / max(replies, 1) * 1000 / 2**10), "KiB"),
        Row("requests that ended otherwise than they should", _one(float(wrong)), "requests", Target(at_most=0)),
    ]


def _one(value: float) -> Any:
    return bootstrap([value])


def main() -> None:
    arguments = parser(__doc__, rounds=1)
    arguments.add_argument("--minutes", type=float, help="how long (default 60; 1 with --quick)")
    arguments.add_argument("--rate", type=float, default=4.0, help="requests per second (default %(default)s)")
    given = arguments.parse_args()
    seconds = 60 * (given.minutes or (1 if given.quick else 60))
    result = Result.begin("soak", f"A soak of {seconds / 60:g} minutes", given)
    result.few_rounds_suffice = True
    result.settings |= {"rate": given.rate, "leave": LEAVE, "fail": FAIL, "models": len(MODELS), "in_memory": 2}
    options = {"pace": 0.02, "tokens": 1_000_000}
    models = [scripted(model=name, min_replicas=0, options=options) for name in MODELS]
    with rotunda(models, environment={"HF_MAX_CACHED_MODELS": "2"}) as server:
        assert server.cluster is not None
        every_s = max(1.0, seconds / 400)
        diary = asyncio.run(run(server, server.cluster.home, seconds, given.rate, given.seed, every_s))
    result.rows += rows(diary, seconds)
    lived = settled(diary.rss, seconds)
    titles = sorted(lived, key=lambda name: -slope(lived[name]))[:SHOWN]
    result.details |= {
        "growth": {name: slope(lived[name]) * 3600 / 2**20 for name in titles},
        "series": {name: [list(point) for point in diary.rss[name]] for name in titles},
        "store": [list(point) for point in diary.store],
        "outcomes": diary.outcomes,
    }
    result.write()


if __name__ == "__main__":
    main()
