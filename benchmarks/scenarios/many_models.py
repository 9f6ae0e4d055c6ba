"""What registered models cost that nobody asks for: 10 in the model store against 300.

``python -m benchmarks.scenarios.many_models``: small models on disk (hard links of one), none in memory. Reported:
memory of the router and the ingress per model, how long the list, a plan and a reply of a resident model take, and the
processors' time of an idle cluster. What 1,000 and 10,000 of them cost the rotation alone is in rotation_sim.json.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.machine import CpuMeter, use_of
from benchmarks.models import ensure, model_id
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import MODEL, scripted
from benchmarks.servers import START_S, Server, rotunda
from benchmarks.stats import bootstrap, percentile


def fill(store: Path, source: Path, count: int) -> None:
    """``count`` models that are one on disk."""
    for number in range(count):
        shutil.copytree(source, store / "many" / f"m{number:04d}", copy_function=os.link)


def until_listed(server: Server, count: int) -> None:
    deadline = time.monotonic() + START_S
    while len(httpx.get(f"{server.url}/api/models", timeout=60).json()["items"]) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{count} models were not listed within {START_S:g} s")
        time.sleep(0.5)


def look(server: Server, idle_s: float, asks: int, seed: int) -> dict[str, float]:
    """One look at an idle cluster."""
    with CpuMeter(server.processes) as meter:
        time.sleep(idle_s)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        lists = [_timed(client, "/api/models") for _ in range(asks)]
        plans = [_timed(client, "/api/models/many/m0003/plan") for _ in range(asks)]
    load = Load(server.url, server.surface, concurrency=1)
    replies = asyncio.run(load.run([Planned(0.0, MODEL, "hello", 4)] * asks)).metrics()
    uses = use_of(server.processes()).values()
    return {
        "router_mib": sum(use.rss for use in uses if "Router" in use.name) / 2**20,
        "ingress_mib": sum(use.rss for use in uses if "ngress" in use.name) / 2**20,
        "idle_cores": meter.spent.total / idle_s,
        "list_ms": percentile(lists, 50) * 1000,
        "plan_ms": percentile(plans, 50) * 1000,
        "ttft_ms": replies["median_ttft_ms"],
    }


def _timed(client: httpx.Client, path: str) -> float:
    begun = time.perf_counter()
    client.get(path).raise_for_status()
    return time.perf_counter() - begun


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--models", type=int, nargs=2, default=None, help="few and many (default 10 300)")
    given = arguments.parse_args()
    few, many = given.models or ((5, 40) if given.quick else (10, 300))
    result = Result.begin("many_models", f"{many} registered models that nobody asks for, against {few}", given)
    result.settings |= {"few": few, "many": many}
    idle_s, asks = (1.0, 3) if given.quick else (5.0, 15)
    source = ensure(["5M"]) / model_id("5M")
    with TemporaryDirectory(dir=source.parents[1].parent) as folder:
        contenders = []
        with ExitStack() as stack:
            for name, count in (("few", few), ("many", many)):
                fill(Path(folder) / name, source, count)
                environment = {"HF_MODEL_PATH": str(Path(folder) / name)}
                server = stack.enter_context(rotunda([scripted()], environment=environment))
                until_listed(server, count)
                contenders.append(Contender(name, partial(look, server, idle_s, asks), server.processes))
            found = measure(contenders, rounds_of(given), given.seed, "models:", warm_up=True)
        for figure, what, unit in (
            ("router_mib", "memory of the router per model", "KiB"),
            ("ingress_mib", "memory of the ingress per model", "KiB"),
        ):
            each = zip(found.values("many", figure), found.values("few", figure), strict=True)
            grown = [(more - less) * 1024 / (many - few) for more, less in each]
            result.add(found, Row(what, bootstrap(grown), unit))
        for figure, what, unit in (
            ("ttft_ms", "TTFT p50 of a resident model", "ms"),
            ("plan_ms", "a plan over HTTP", "ms"),
            ("list_ms", "the list of models over HTTP", "ms"),
            ("idle_cores", "processors in use while idle", "cores"),
        ):
            result.add(found, found.ratio(f"{what}, {many} against {few}", "many", "few", figure, unit, Target()))
        result.details["rounds"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
