"""More than it can serve: what still gets through in time, and how fast the rest is told no.

``python -m benchmarks.scenarios.overload``: a scripted model with 16 slots, replies of one second and room for 16 that
wait. A closed loop finds the saturation; then open loops (Poisson) send 0.5, 0.8, 1, 2 and 5 times as much. A good
reply has its first token within two seconds of its intended arrival.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.arrivals import Prompts, plan
from benchmarks.client import Load, Run
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import scripted
from benchmarks.servers import Server, rotunda
from benchmarks.stats import bootstrap, paired_ratio, percentile

SLOTS, QUEUE, TOKENS, PACE = 16, 16, 50, 0.02
SLO = {"ttft": 2.0}
LOADS = (0.5, 0.8, 1.0, 2.0, 5.0)
MODEL = "bench/overload"
REFUSE = "[[error=QUEUE_FULL]] "


def saturation(server: Server, requests: int, seed: int) -> float:
    """Requests per second of a closed loop that keeps every slot busy."""
    planned = plan([MODEL], requests, seed=seed, max_tokens=TOKENS, prompts=Prompts(16))
    found = asyncio.run(Load(server.url, server.surface, concurrency=SLOTS + QUEUE // 2).run(planned)).metrics()
    return float(found["request_throughput"])


def refusals(run: Run) -> list[float]:
    """Seconds from the intended arrival to the whole refusal."""
    return [sample.ended - sample.intended for sample in run.samples if sample.error == "QUEUE_FULL"]


def at_rate(server: Server, name: str, rate: float, seconds: float) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        count = max(8, round(rate * seconds))
        planned = plan([MODEL], count, seed=seed, max_tokens=TOKENS, prompts=Prompts(16), rate=rate)
        run = asyncio.run(Load(server.url, server.surface, timeout_s=60).run(planned))
        found, refused = run.metrics(SLO), refusals(run)
        failed = {code: count for code, count in found["errors"].items() if code != "QUEUE_FULL"}
        return {
            "rate": rate,
            # Of the time in which requests arrive: the last replies end after it.
            "goodput": found["request_goodput"] * run.duration / seconds,
            "attainment": found["slo_attainment"],
            "refused_per_s": len(refused) / seconds,
            "refusal_p50_ms": percentile(refused, 50) * 1000,
            "ttft_p50_ms": found["median_ttft_ms"] or float("nan"),
            "ttft_p99_ms": found["p99_ttft_ms"] or float("nan"),
            "other_failures": float(sum(failed.values())),
            "client_lag_p99_ms": found["client_lag_ms"]["p99"],
        }

    return Contender(name, one_round, server.processes)


def idle_refusal(server: Server, requests: int) -> Contender:
    """A refusal by the same replica while nothing runs."""

    def one_round(seed: int) -> dict[str, float]:
        planned = plan([MODEL], requests, seed=seed, max_tokens=TOKENS, prompts=Prompts(16, prefix=REFUSE))
        run = asyncio.run(Load(server.url, server.surface, concurrency=1).run(planned))
        return {"refusal_p50_ms": percentile(refusals(run), 50) * 1000}

    return Contender("idle", one_round, server.processes)


def curve(rounds: Mapping[str, list[Any]], names: Mapping[str, float]) -> list[dict[str, float]]:
    """Medians over the rounds, for the plots."""
    keys = ("rate", "goodput", "attainment", "refused_per_s", "ttft_p50_ms", "ttft_p99_ms")
    return [{key: median(one[key] for one in rounds[name]) for key in keys} for name in names]


def main() -> None:
    given = parser(__doc__, rounds=5).parse_args()
    seconds = 3.0 if given.quick else 10.0
    result = Result.begin("overload", "Overload: goodput and refusals", given)
    result.settings |= {
        "slots": SLOTS, "queue": QUEUE, "reply": f"{TOKENS} tokens, {PACE * 1000:g} ms each", "good": SLO,
        "seconds": seconds,
    }  # fmt: skip
    model = scripted(
        model=MODEL, max_concurrency=SLOTS, max_queue=QUEUE, options={"pace": PACE, "tokens": TOKENS}
    )  # fmt: skip
    with rotunda([model]) as server:
        peak = saturation(server, SLOTS * (2 if given.quick else 6), given.seed)
        names = {f"{load:g}x": load for load in LOADS}
        loads = [at_rate(server, name, peak * load, seconds) for name, load in names.items()]
        found = measure([idle_refusal(server, 8), *loads], rounds_of(given), given.seed, "overload:", warm_up=False)
        best = [
            max(found.values(name, "goodput")[index] for name in names) for index in range(len(found.rounds["idle"]))
        ]
        for name in ("2x", "5x"):
            bound = Target(at_least=0.9) if name == "2x" else Target()
            good = paired_ratio(found.values(name, "goodput"), best)
            result.add(found, Row(f"{name} saturation: goodput over the peak", good, "ratio", bound))
            bound = Target(at_most=2.0) if name == "2x" else Target()
            what = f"{name} saturation: median refusal latency over the idle one"
            if all(map(math.isfinite, found.values(name, "refusal_p50_ms"))):
                result.add(found, found.ratio(what, name, "idle", "refusal_p50_ms", "ms", bound))
            else:
                result.problems.append(f"in a round at {name} saturation nothing was refused")
            failed = bootstrap(found.values(name, "other_failures"))
            result.add(
                found, Row(f"{name} saturation: failures that are no refusal", failed, "requests", Target(at_most=0))
            )
        result.details |= {"saturation_per_s": peak, "curve": curve(found.rounds, names), "rounds": found.rounds}
    result.write()


if __name__ == "__main__":
    main()
