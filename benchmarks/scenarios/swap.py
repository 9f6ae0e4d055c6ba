"""A swap: a request for a model that is not in memory, while another one fills the only place.

``python -m benchmarks.scenarios.swap`` measures from the request to its first token, and beside it, in every round,
what nobody could avoid: retiring the other model until its process is gone, starting an empty replica, and a bare
script that imports the same modules, loads the same model and generates one token. Their sum is the baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.models import CACHE, model_id
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.cold import until
from benchmarks.scenarios.paced import scripted
from benchmarks.servers import Server, rotunda
from benchmarks.stats import bootstrap

MODEL, VICTIM, EMPTY = model_id("5M"), model_id("30M"), "bench/empty"
SETTLE_S = 4.0
"""A model that has just been loaded is not asked to leave at once; what is compared begins after that."""


def bare(folder: str) -> None:
    """What the script does: no server, no platform. Prints the seconds from the first import to the first token."""
    begun = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False)
    print(time.perf_counter() - begun)  # noqa: T201


def bare_seconds(model: str) -> float:
    """A fresh process for :func:`bare`."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scenarios.swap", "--bare", str(CACHE / model)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def first_token(server: Server, model: str) -> float:
    """Seconds from a request to its first token."""
    load = Load(server.url, server.surface, concurrency=1)
    sample = asyncio.run(load.run([Planned(0.0, model, "w1 w2 w3", 2)])).samples[0]
    if not sample.ok:
        raise RuntimeError(f"{model}: {sample.error}")
    return float(sample.ttft)


def unload(server: Server, model: str) -> float:
    """Seconds from the order until the process is gone."""
    assert server.cluster is not None
    pids = server.cluster.model(model)["pids"]
    begun = time.monotonic()
    httpx.post(f"{server.url}/api/models/{model}/unload", timeout=60).raise_for_status()
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        time.sleep(0.01)
    took = time.monotonic() - begun
    until(server, model, "cold")
    return took


def contender(server: Server) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        first_token(server, VICTIM)
        time.sleep(SETTLE_S)
        swap = first_token(server, MODEL)
        time.sleep(SETTLE_S)
        unload(server, MODEL)
        first_token(server, VICTIM)
        time.sleep(SETTLE_S)
        retire = unload(server, VICTIM)
        empty = first_token(server, EMPTY)
        time.sleep(SETTLE_S)
        unload(server, EMPTY)
        script = bare_seconds(MODEL)
        sum_ms = (retire + empty + script) * 1000
        return {
            "swap_ms": swap * 1000,
            "retire_ms": retire * 1000,
            "empty_ms": empty * 1000,
            "script_ms": script * 1000,
            "sum_ms": sum_ms,
        }

    return Contender("swap", one_round, server.processes, changing=True)


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.bare:
        bare(str(given.bare))
        return
    result = Result.begin("swap", "One model in the place of another", given)
    models = [
        scripted(model=EMPTY, min_replicas=0, options={"tokens": 8}),
        *({"model": name, "num_cpus": 1, "min_replicas": 0} for name in (MODEL, VICTIM)),
    ]
    with ExitStack() as stack:
        # However long a load takes on this machine, it is measured.
        place = {"MAX_CONCURRENT_MODELS": "1", "HF_LOAD_TIMEOUT_MS": "600000"}
        server = stack.enter_context(rotunda(models, sizes=["5M", "30M"], environment=place, settings="one place"))
        found = measure([contender(server)], rounds_of(given), given.seed, "swap:")
        swap, whole = found.values("swap", "swap_ms"), found.values("swap", "sum_ms")
        result.add(
            found,
            Row("request to first token ÷ (retire + empty replica + script)", bootstrap(ratio_of(swap, whole)), "×",
                Target(at_most=1.25)),
            found.value("request to first token, one model evicted for it", "swap", "swap_ms", "ms"),
            found.value("retire until the process is gone", "swap", "retire_ms", "ms"),
            found.value("start of an empty replica, to its first token", "swap", "empty_ms", "ms"),
            found.value("bare script: import, load, one token", "swap", "script_ms", "ms"),
        )  # fmt: skip
        result.details |= {"rounds": found.rounds}
    result.write()


if __name__ == "__main__":
    main()
