"""What each hop adds: the engine itself, plain Ray Serve around it, Rotunda around it.

``python -m benchmarks.scenarios.hops`` asks the scripted engine (first token at once) for one stream at a time and for
eight, directly in this process, through plain Serve, and through Rotunda on each of its surfaces. With a reply of many
tokens that are all due at once it also measures the time that each hop takes per token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import MODEL, scripted
from benchmarks.servers import Server, on, plain_serve, rotunda
from benchmarks.stats import bootstrap

LONG = 2000
"""Tokens of a reply that is there at once."""


def direct(requests: int) -> Contender:
    """The scripted engine in this process."""

    def one_round(seed: int) -> dict[str, float]:
        return asyncio.run(_direct(requests))

    return Contender("engine", one_round)


async def _direct(requests: int) -> dict[str, float]:
    from serve_app.domain.generation import Delta, GenerationRequest, Message, Options
    from serve_app.engines.base import EngineOptions
    from serve_app.engines.registry import create, describe

    info = describe("scripted", MODEL)
    assert info is not None
    engine = create("scripted", info, EngineOptions(extra=(("tokens", 1_000_000),)))

    async def ask(tokens: int) -> tuple[float, float]:
        begun, first = time.perf_counter(), None
        request = GenerationRequest("r", MODEL, (Message.of("user", "hello"),), Options(max_tokens=tokens), raw=True)
        async for item in engine.generate(request):
            if first is None and isinstance(item, Delta):
                first = time.perf_counter()
        assert first is not None
        return first - begun, (time.perf_counter() - first) / max(tokens - 1, 1)

    firsts = [(await ask(4))[0] for _ in range(requests)]
    _, per_token = await ask(LONG)
    await engine.close()
    return {"ttft_p50_ms": median(firsts) * 1000, "us_per_token": per_token * 1e6}


def through(server: Server, requests: int, streams: int) -> Contender:
    """``requests`` short replies, ``streams`` at a time, then one long one."""

    def one_round(seed: int) -> dict[str, float]:
        short = [Planned(0.0, server.model, f"hello {seed}", 4) for _ in range(requests)]
        load = Load(server.url, server.surface, concurrency=streams)
        quick = asyncio.run(load.run(short)).whole(server.name)
        long = asyncio.run(load.run([Planned(0.0, server.model, "a long one", LONG)])).samples[0]
        assert long.ok, long.error
        return {
            "ttft_p50_ms": quick["median_ttft_ms"],
            "us_per_token": (long.times[-1] - long.times[0]) / (LONG - 1) * 1e6,
        }

    return Contender(server.name, one_round, server.processes)


def added(what: str, ours: Sequence[float], base: Sequence[float], unit: str, target: Target) -> Row:
    """ours − base, round by round."""
    return Row(what, bootstrap([mine - other for mine, other in zip(ours, base, strict=True)]), unit, target)


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--requests", type=int, help="short replies in a round (default 60; 8 with --quick)")
    given = arguments.parse_args()
    requests = given.requests or (8 if given.quick else 60)
    result = Result.begin("hops", "What each hop adds (scripted engine, first token at once)", given)
    result.settings |= {"requests": requests, "long_reply": LONG}
    model = scripted(options={"tokens": 1_000_000}, max_tokens=1_000_000)
    with ExitStack() as stack:
        ours = stack.enter_context(rotunda([model]))
        servers = [ours, on(ours, "completions"), on(ours, "chat"), on(ours, "graphql")]
        plain = stack.enter_context(plain_serve(MODEL, options={"extra": {"tokens": 1_000_000}, "max_concurrency": 64}))
        for streams in (1, 8):
            contenders = [direct(requests), *(through(server, requests, streams) for server in (*servers, plain))]
            found = measure(contenders, rounds_of(given), given.seed, f"{streams} streams:")
            at = f"{streams} stream{'s' if streams > 1 else ''}"
            base = found.values(plain.name, "ttft_p50_ms")
            for server in servers:
                first = found.values(server.name, "ttft_p50_ms")
                # Both ways of the target: the larger of 1.15 × plain Serve and 5 ms above it.
                room = Target(at_most=max(5.0, 0.15 * median(base)) if streams == 1 else None)
                what = f"{at}, {server.name}: TTFT p50 above plain Serve"
                over = f"{at}, {server.name}: TTFT p50 above the engine"
                aim = Target(at_most=10.0 if streams == 1 else None)
                result.add(
                    found,
                    added(what, first, base, "ms", room),
                    added(over, first, found.values("engine", "ttft_p50_ms"), "ms", aim),
                )
            if streams == 1:
                for name in ("engine", *(server.name for server in servers), plain.name):
                    what = f"{name}: time per token of a reply that is there at once"
                    result.add(found, found.value(what, name, "us_per_token", "µs"))
            result.details[at] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
