"""One replica and two: what the second is worth where the cores do not decide.

``python -m benchmarks.scenarios.replicas``: the scripted engine with 16 slots in each replica and a token every 40 ms,
so that a replica's capacity is known; as many streams as slots, several replies of differing lengths one after the
other in each. (Replies of one length end together: then one request too many at a replica costs the whole of another
reply's time, and the figure says how often that happened and not what the second replica is worth.)
"""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import scripted
from benchmarks.servers import Server, rotunda
from benchmarks.stats import paired_ratio

SLOTS, PACE = 16, 0.04


def contender(server: Server, replicas: int, tokens: int, turns: int) -> Contender:
    streams = SLOTS * replicas

    def one_round(seed: int) -> dict[str, float]:
        rng = random.Random(seed)
        planned = [
            Planned(0.0, server.model, f"{seed} {index}", rng.randint(tokens // 2, tokens * 3 // 2))
            for index in range(streams * turns)
        ]
        run = asyncio.run(Load(server.url, server.surface, concurrency=streams).run(planned))
        found = run.whole(server.name)
        return {"tokens_per_s": found["output_throughput"], "ttft_p50_ms": found["median_ttft_ms"]}

    return Contender(server.name, one_round, server.processes)


def main() -> None:
    given = parser(__doc__, rounds=5).parse_args()
    tokens, turns = (25, 2) if given.quick else (75, 8)
    result = Result.begin("replicas", "Two replicas against one", given)
    result.settings |= {"slots": SLOTS, "pace_s": PACE, "tokens": f"{tokens} ± 50 %", "turns": turns}
    models = [
        scripted(
            model=f"bench/{name}", max_concurrency=SLOTS, min_replicas=count, max_replicas=count,
            options={"pace": PACE, "tokens": 1_000_000},
        )
        for name, count in (("one", 1), ("two", 2))
    ]  # fmt: skip
    with ExitStack() as stack:
        server = stack.enter_context(rotunda(models, surface="completions"))
        one, two = (replace(server, name=name, model=f"bench/{name}") for name in ("one", "two"))
        contenders = [contender(one, 1, tokens, turns), contender(two, 2, tokens, turns)]
        found = measure(contenders, rounds_of(given), given.seed, "replicas:")
        ones, twos = found.values("one", "tokens_per_s"), found.values("two", "tokens_per_s")
        sides = {"two replicas": sorted(twos)[len(twos) // 2], "one": sorted(ones)[len(ones) // 2]}
        efficiency = paired_ratio([value / 2 for value in twos], ones)
        what = "scaling efficiency: tokens/s of two replicas over twice those of one"
        result.add(found, Row(what, efficiency, "ratio", Target(at_least=0.9), sides, "tokens/s"))
        offered = Row(
            "one replica: share of what its slots can emit",
            paired_ratio(ones, [SLOTS / PACE] * len(ones)), "ratio", Target(), {}, "",
        )  # fmt: skip
        result.add(found, offered)
        result.details["rounds"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
