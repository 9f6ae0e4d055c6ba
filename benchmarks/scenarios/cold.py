"""Waking a model that is not in memory, broken down by what a replica of each kind has to do.

``python -m benchmarks.scenarios.cold`` unloads and asks again: a scripted model (only the process starts), and Llamas
of 5 M and 90 M parameters (torch and transformers are imported, weights are read). The differences are the phases.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import httpx

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.models import model_id
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.hops import added
from benchmarks.scenarios.paced import scripted
from benchmarks.servers import START_S, Server, rotunda
from benchmarks.stats import bootstrap

SMALL, LARGE = "5M", "90M"
SCRIPTED = "bench/empty"


def until(server: Server, model: str, state: str) -> float:
    """Seconds until the model is in this state."""
    begun = time.monotonic()
    assert server.cluster is not None
    while server.cluster.model(model)["state"] != state:
        if time.monotonic() - begun > START_S:
            raise RuntimeError(f"{model} was not {state} within {START_S:g} s: {server.cluster.model(model)}")
        time.sleep(0.02)
    return time.monotonic() - begun


def contender(server: Server, model: str, warm: int) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        assert server.cluster is not None
        if server.cluster.model(model)["state"] != "cold":
            httpx.post(f"{server.url}/api/models/{model}/unload", timeout=60).raise_for_status()
        gone = until(server, model, "cold")
        load = Load(server.url, server.surface, concurrency=1)
        first = asyncio.run(load.run([Planned(0.0, model, f"w1 w2 w{seed % 1000}", 2)])).samples[0]
        if not first.ok:
            raise RuntimeError(f"{model}: {first.error}")
        again = asyncio.run(load.run([Planned(0.0, model, "w1 w2 w3", 2)] * warm)).metrics()
        return {
            "cold_ttft_ms": first.ttft * 1000,
            "warm_ttft_ms": again["median_ttft_ms"],
            "unload_ms": gone * 1000,
        }

    return Contender(model, one_round, server.processes)


def main() -> None:
    given = parser(__doc__, rounds=5).parse_args()
    result = Result.begin("cold", "Waking a model from zero", given)
    names = [SCRIPTED, model_id(SMALL), model_id(LARGE)]
    models = [
        scripted(model=SCRIPTED, min_replicas=0, options={"tokens": 8}),
        *({"model": name, "num_cpus": 1, "min_replicas": 0} for name in names[1:]),
    ]
    with ExitStack() as stack:
        server = stack.enter_context(rotunda(models, sizes=[SMALL, LARGE]))
        contenders = [contender(server, name, 2 if given.quick else 8) for name in names]
        found = measure(contenders, rounds_of(given), given.seed, "cold:")
        empty, small, large = (found.values(name, "cold_ttft_ms") for name in names)
        nothing = [0.0] * len(empty)
        gone = [value for name in names for value in found.values(name, "unload_ms")]
        warm = found.values(names[1], "warm_ttft_ms")
        result.add(
            found,
            added(
                "time to the first token from zero, scripted: Serve starts the replica", empty, nothing, "ms", Target()
            ),
            added("the same, 5 M parameters", small, nothing, "ms", Target()),
            added("the same, 90 M parameters", large, nothing, "ms", Target()),
            added("of it imports (5 M − scripted)", small, empty, "ms", Target()),
            added("of it weights (90 M − 5 M)", large, small, "ms", Target()),
            added("warm, 5 M parameters", warm, nothing, "ms", Target()),
            Row("from the order to unload until it is gone", bootstrap(gone), "ms"),
        )
        result.details |= {
            "cold_ttft_ms": small, "warm_ttft_ms": [*warm], "rounds": found.rounds,
        }  # fmt: skip
    result.write()


if __name__ == "__main__":
    main()
