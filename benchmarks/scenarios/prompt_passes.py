"""What it is worth to read more of a burst's prompts in one pass, and what a newcomer pays for it: the bare engine.

``python -m benchmarks.scenarios.prompt_passes`` lets 32 streams begin at once (prompts of 64 words ± 50 %, 128 new
tokens) on a Llama of 5 million random weights, once with as much in a pass as the engine chooses, and once for each of
some limits (``batch_tokens``); and one stream for the ratio. A request of 16 words comes right after the burst: how
long does it wait?
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import ExitStack
from statistics import median

from benchmarks.models import SIZES, ensure, model_id
from benchmarks.protocol import Contender, Result, Target, measure, parser, rounds_of
from benchmarks.scenarios.batch_scaling import Figures, ask, words
from serve_app.engines.base import Engine, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.pace import BURST, MAX_CHUNK
from serve_app.engines.registry import create

LIMITS = (None, BURST)
STREAMS = 32
BEHIND_S = 0.05
"""After the burst: its prompts are being read then."""


async def burst(engine: Engine, rng: random.Random, streams: int, tokens: int) -> Figures:
    """Tokens per second of requests that come at once, their median time to the first token, and, where there are
    several, that of one that comes :data:`BEHIND_S` later, which the tokens per second leave out."""
    prompts, late = [words(rng, rng.randint(32, 96)) for _ in range(streams)], words(rng, 16)
    begun = time.perf_counter()

    async def newcomer() -> float:
        await asyncio.sleep(BEHIND_S)
        return (await ask(engine, late, 1)).ttft

    waited = asyncio.create_task(newcomer()) if streams > 1 else None
    runs = await asyncio.gather(*(ask(engine, prompt, tokens) for prompt in prompts))
    seconds = time.perf_counter() - begun
    return {
        "tokens_per_s": sum(run.usage.completion_tokens for run in runs) / seconds,
        "ttft_p50_ms": median(run.ttft for run in runs) * 1000,
        **({} if waited is None else {"newcomer_ttft_ms": await waited * 1000}),
    }


def contenders(stack: ExitStack, size: str, threads: int, tokens: int) -> list[Contender]:
    """One stream, and the burst with each limit, every limit on an engine of its own."""
    runner = stack.enter_context(asyncio.Runner())
    path = ensure([size]) / model_id(size)

    def engine(limit: int | None) -> Engine:
        extra = () if limit is None else (("batch_tokens", limit),)
        options = EngineOptions(threads=threads, max_concurrency=STREAMS + 1, extra=extra)

        async def make() -> Engine:
            return await asyncio.to_thread(create, "transformers", inspect(path, size), options)

        made = runner.run(make())
        stack.callback(lambda: runner.run(made.close()))
        return made

    def contender(name: str, of: Engine, streams: int) -> Contender:
        return Contender(name, lambda seed: runner.run(burst(of, random.Random(seed), streams, tokens)))

    first = engine(MAX_CHUNK)
    made = [contender("1 stream", first, 1), contender(name_of(MAX_CHUNK), first, STREAMS)]
    return [*made, *(contender(name_of(limit), engine(limit), STREAMS) for limit in LIMITS)]


def name_of(limit: int | None) -> str:
    return f"{STREAMS} streams, passes " + ("as the engine chooses" if limit is None else f"of {limit:,}")


def main() -> None:
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--size", choices=SIZES, default="5M")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--tokens", type=int, help="of each reply (default 128; 48 with --quick)")
    given = arguments.parse_args()
    tokens = given.tokens or (48 if given.quick else 128)
    size = given.size
    result = Result.begin("prompt_passes", f"Longer passes of prompts for a burst, {size} parameters", given)
    result.settings |= {"threads": given.threads, "new_tokens": tokens, "newcomer": f"{BEHIND_S * 1000:.0f} ms later"}
    with ExitStack() as stack:
        found = measure(contenders(stack, size, given.threads, tokens), rounds_of(given), given.seed)
    usual = name_of(MAX_CHUNK)
    for limit in (MAX_CHUNK, *LIMITS):
        name = name_of(limit)
        what = f"tokens/s at {name}, over one stream"
        target = Target(at_least=7.0 if limit is None else None)
        result.add(found, found.ratio(what, name, "1 stream", "tokens_per_s", "tokens/s", target))
        if limit == MAX_CHUNK:
            continue
        over = f"{name}, over {MAX_CHUNK}"
        result.rows += [
            found.ratio(f"tokens/s at {over}", name, usual, "tokens_per_s", "tokens/s"),
            found.ratio(f"TTFT p50 at {over}", name, usual, "ttft_p50_ms", "ms"),
            found.ratio(f"TTFT of a newcomer at {over}", name, usual, "newcomer_ttft_ms", "ms"),
        ]
    result.details["rounds"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()
