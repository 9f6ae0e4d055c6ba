"""What the platform keeps of a known pace: the scripted engine emits token n at t0 + n · 10 ms, whatever happens.

``python -m benchmarks.scenarios.paced`` asks for 32 and 64 such streams at once from Rotunda and from plain Ray Serve
with the same engine, and reports the share of the offered rate that arrived, the gap between tokens, and the CPU per
token of all processes but the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import psutil

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.machine import CpuMeter
from benchmarks.metrics import Sample, concurrent_rate
from benchmarks.profiling import profile_under
from benchmarks.protocol import Contender, Measured, Result, Row, Target, measure, parser, rounds_of
from benchmarks.servers import Server, on, plain_serve, rotunda
from benchmarks.stats import percentile

PACE = 0.01
MODEL = "bench/paced"


def scripted(**args: Any) -> dict[str, Any]:
    """Arguments of a model application with the scripted engine."""
    return {
        "model": MODEL, "engine": "scripted", "num_cpus": 1, "min_replicas": 1, "max_replicas": 1,
        "max_concurrency": 128, "options": {"pace": PACE, "tokens": 1_000_000, "in_step": True}, **args,
    }  # fmt: skip


def contender(server: Server, streams: int, tokens: int, pace: float = PACE, over_s: float = 0.0) -> Contender:
    """``streams`` replies of ``tokens`` tokens at once; one token is due per ``pace`` seconds. All are sent together,
    or evenly over the first ``over_s`` seconds."""

    def one_round(seed: int) -> dict[str, float]:
        planned = [
            Planned(index * over_s / streams, server.model, f"stream {index} of {seed}", tokens)
            for index in range(streams)
        ]
        with CpuMeter(server.processes) as meter:
            run = asyncio.run(Load(server.url, server.surface, concurrency=streams).run(planned))
        found = run.whole(server.name)
        gaps = [gap for sample in run.samples for gap in sample.gaps]
        begun = [sample.times[0] for sample in run.samples]
        return {
            "share": offered_share(run.samples, tokens, pace),
            **({} if (rate := concurrent_rate(run.samples)) is None else {"rate": rate}),
            "gap_p50_ms": percentile(gaps, 50) * 1000,
            "gap_p99_ms": percentile(gaps, 99) * 1000,
            "cpu_us_per_token": meter.spent.total / found["total_output_tokens"] * 1e6,
            "ttft_p50_ms": found["median_ttft_ms"],
            "begun_ms": (max(begun) - min(begun)) * 1000,
            "tokens_per_chunk": found["tokens_per_chunk"],
        }

    return Contender(server.name, one_round, server.processes)


def offered_share(samples: Sequence[Sample], tokens: int, pace: float = PACE) -> float:
    """The rate that arrived over the rate that was offered, all streams together: from the first token of any to the
    last token of any, one token per ``pace`` and stream was offered."""
    begun = min(sample.times[0] for sample in samples)
    ended = max(sample.times[-1] for sample in samples)
    return (tokens - 1) * pace / (ended - begun)


def rate_kept(result: Result, found: Measured, at: str, target: Target) -> list[Row]:
    """The row of "on" over "off" while all streams run; a problem of the result when they never did."""
    if all("rate" in figures for name in ("on", "off") for figures in found.rounds[name]):
        what = f"{at}: tokens per second while all run, on over off"
        return [found.ratio(what, "on", "off", "rate", "tok/s", target)]
    result.problems.append(f"{at}: in a round there was no time at which all streams ran")
    return []


def profiled(server: Server, streams: int, seconds: float = 8.0) -> dict[str, dict[str, float]]:
    """Where the replicas' time goes while ``streams`` streams run."""
    load = contender(server, streams, round((seconds + 4) / PACE))

    def replicas() -> list[psutil.Process]:
        return [process for process in server.processes() if "ServeReplica" in " ".join(process.cmdline())]

    return profile_under(lambda: load.measure(0), replicas, seconds)


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--streams", type=int, nargs="+", default=[32, 64])
    arguments.add_argument("--tokens", type=int, default=None, help="of each stream (default 500; 100 with --quick)")
    arguments.add_argument("--profile", action="store_true", help="also say where the time goes (py-spy)")
    given = arguments.parse_args()
    tokens = given.tokens or (100 if given.quick else 500)
    result = Result.begin("paced", "A known pace: one token per stream every 10 ms", given)
    result.settings |= {"pace_s": PACE, "tokens": tokens, "store": "on (SQLite) on the chat service's own surface"}
    options = {"max_concurrency": 128, "extra": {"pace": PACE, "tokens": 1_000_000, "in_step": True}}
    with ExitStack() as stack:
        ours = stack.enter_context(rotunda([scripted()], surface="sse", settings="one ingress, HAProxy"))
        plain = stack.enter_context(plain_serve(MODEL, options=options))
        without = on(ours, "completions")
        for streams in given.streams:
            found = measure(
                [contender(server, streams, tokens) for server in (ours, without, plain)],
                rounds_of(given), given.seed, f"{streams} streams:",
            )  # fmt: skip
            kept, kept_off = (0.90, 0.94) if streams <= 32 else (0.80, 0.87)
            quarter = Target(at_most=0.25)
            share, cpu = "share of the offered rate that arrived", "CPU per token, all processes but the client"
            begun = "from the first stream's first token to the last one's"
            stored = f"{streams} streams, stored ({ours.surface.name})"
            passing = f"{streams} streams, nothing stored ({without.surface.name})"
            result.add(
                found,
                found.value(f"{stored}: {share}", ours.name, "share", "share", Target(at_least=kept)),
                found.value(f"{passing}: {share}", without.name, "share", "share", Target(at_least=kept_off)),
                found.value(f"{streams} streams, plain Serve: {share}", plain.name, "share", "share"),
                found.value(f"{stored}: p50 gap", ours.name, "gap_p50_ms", "ms", Target(at_most=11)),
                found.value(f"{passing}: p50 gap", without.name, "gap_p50_ms", "ms", Target(at_most=11)),
                *(
                    found.value(f"{at}: {begun}", server.name, "begun_ms", "ms")
                    for at, server in ((stored, ours), (passing, without), (f"{streams} streams, plain Serve", plain))
                ),
                found.ratio(f"{stored}: {cpu}", ours.name, plain.name, "cpu_us_per_token", "µs", quarter),
                found.ratio(
                    f"{passing}: {cpu}", without.name, plain.name, "cpu_us_per_token", "µs", Target(at_most=0.25)
                ),
            )
            result.details[f"{streams} streams"] = found.rounds
        if given.profile:
            result.details["profile"] = {server.name: profiled(server, streams) for server in (ours, without, plain)}
    result.write()


if __name__ == "__main__":
    main()
