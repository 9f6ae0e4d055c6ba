"""What sharing a forward pass is worth: the bare engine, in one process, without HTTP.

``python -m benchmarks.scenarios.batch_scaling`` takes random-weight Llamas of about 5, 30 and 90 million parameters and
measures 1, 8 and 32 streams (prompts of 64 words ± 50 %), the second turn of a long conversation, and the gap between
the tokens of running streams while a long prompt is read beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass

from benchmarks.arrivals import DRAWN
from benchmarks.models import SIZES, ensure, model_id
from benchmarks.protocol import Contender, Result, Target, measure, parser, rounds_of
from serve_app.domain.generation import Delta, Finish, GenerationRequest, Message, Options, Usage
from serve_app.engines.base import Engine, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.registry import create

STREAMS = (1, 8, 32)
SHORT = ("5M", "30M")
"""Measured if nothing is said; the largest takes as long as both."""
HISTORY, INTRUDER = 1500, 2000
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One request: when it was sent, and when each of its tokens came, in seconds after that."""

    sent: float
    times: tuple[float, ...]
    text: str
    usage: Usage

    @property
    def ttft(self) -> float:
        return self.times[0]


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(1, DRAWN)}" for _ in range(count))


async def ask(engine: Engine, prompt: str, tokens: int) -> Run:
    options = Options(temperature=0.0, max_tokens=tokens)
    request = GenerationRequest("r", engine.info.id, (Message.of("user", prompt),), options, raw=True)
    times, text, begun = [], [], time.perf_counter()
    async for item in engine.generate(request):
        if isinstance(item, Delta):
            times.append(time.perf_counter() - begun)
            text.append(item.text)
        elif isinstance(item, Finish):
            return Run(begun, tuple(times), "".join(text), item.usage)
    raise AssertionError("unreachable: a stream ends with Finish or raises")


async def throughput(engine: Engine, rng: random.Random, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of ``streams`` requests that come at once, prompts of 64 tokens ± 50 %: over the whole time,
    prompts included, and from the last one's first token to the first one's last."""
    prompts = [words(rng, rng.randint(32, 96)) for _ in range(streams)]
    begun = time.perf_counter()
    runs = await asyncio.gather(*(ask(engine, prompt, tokens) for prompt in prompts))
    whole = sum(run.usage.completion_tokens for run in runs) / (time.perf_counter() - begun)
    start, end = max(run.sent + run.ttft for run in runs), min(run.sent + run.times[-1] for run in runs)
    if end <= start:
        raise SystemExit(f"{tokens} new tokens are too few: the first of {streams} streams ended before all ran.")
    within = sum(start < run.sent + at <= end for run in runs for at in run.times)
    return whole, within / (end - start)


async def second_turn(engine: Engine, rng: random.Random) -> tuple[float, float, int]:
    """Seconds to the first token with ``HISTORY`` new tokens, and with 16 new ones after them; tokens reused."""
    first_prompt = words(rng, HISTORY)
    first = await ask(engine, first_prompt, 16)
    second = await ask(engine, f"{first_prompt} {first.text} {words(rng, 16)}", 4)
    return first.ttft, second.ttft, second.usage.cached_tokens


async def disturbed(engine: Engine, rng: random.Random, streams: int, tokens: int) -> tuple[float, float, float]:
    """The p99 gap of running streams alone and beside a long prompt, in seconds, and that prompt's time to first
    token."""

    async def run(intruder: bool) -> tuple[float, float]:
        prompts = [words(rng, 32) for _ in range(streams)]
        long = words(rng, INTRUDER)
        begun = time.perf_counter()
        tasks = [asyncio.create_task(ask(engine, prompt, tokens)) for prompt in prompts]
        while engine.counters().completion_tokens < before + 4 * streams:  # noqa: ASYNC110 -- counters wake nobody
            await asyncio.sleep(0.001)
        entered = time.perf_counter() - begun
        guest = await ask(engine, long, 1) if intruder else None
        left = time.perf_counter() - begun if guest else float("inf")
        runs = await asyncio.gather(*tasks)
        gaps = sorted(
            after - earlier
            for one in runs
            for earlier, after in zip(one.times, one.times[1:], strict=False)
            if after > entered and earlier < left
        )
        return gaps[int(len(gaps) * 0.99)], guest.ttft if guest else 0.0

    before = engine.counters().completion_tokens
    alone, _ = await run(False)
    before = engine.counters().completion_tokens
    beside, ttft = await run(True)
    return alone, beside, ttft


class Engines:
    """One engine per contender name, in one event loop of this process."""

    def __init__(self, size: str, threads: int, tokens: int) -> None:
        self._runner = asyncio.Runner()
        self._tokens = tokens
        path = ensure([size]) / model_id(size)
        info, options = inspect(path, size), EngineOptions(threads=threads, max_concurrency=max(STREAMS))

        async def make() -> Engine:
            return await asyncio.to_thread(create, "transformers", info, options)

        self.engine = self._runner.run(make())

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self.engine.close())
        self._runner.close()

    def streams(self, count: int) -> Contender:
        async def one_round(seed: int, tokens: int) -> Figures:
            whole, steady = await throughput(self.engine, random.Random(seed), count, tokens)
            return {"tokens_per_s": whole, "decode_tokens_per_s": steady}

        return Contender(
            f"{count} streams",
            lambda seed: self._runner.run(one_round(seed, self._tokens)),
            warm_up=lambda seed: self._runner.run(one_round(seed, self._tokens)),
        )

    def turns(self) -> Contender:
        async def one_round(seed: int) -> Figures:
            first, second, cached = await second_turn(self.engine, random.Random(seed))
            return {"first_ttft_ms": first * 1000, "ratio": second / first, "cached": float(cached)}

        return Contender("turns", lambda seed: self._runner.run(one_round(seed)), warm_up=lambda seed: None)

    def guest(self) -> Contender:
        async def one_round(seed: int) -> Figures:
            alone, beside, ttft = await disturbed(self.engine, random.Random(seed), 8, 2 * self._tokens)
            return {"gap_p99_ms": alone * 1000, "growth": beside / alone, "long_prompt_ttft_ms": ttft * 1000}

        return Contender("guest", lambda seed: self._runner.run(one_round(seed)), warm_up=lambda seed: None)


def one_size(size: str, given: argparse.Namespace, result: Result) -> None:
    with Engines(size, given.threads, result.settings["new_tokens"]) as engines:
        result.settings[size] = engines.engine.description
        contenders = [*(engines.streams(count) for count in STREAMS), engines.turns(), engines.guest()]
        found = measure(contenders, rounds_of(given), given.seed, f"{size}:", budget_s=given.budget)
    for count in STREAMS[1:]:
        bound = {("90M", 8): 3.0, ("5M", 32): 7.0}.get((size, count))
        for figure, kind in (("tokens_per_s", "prompts included"), ("decode_tokens_per_s", "decoding only")):
            what = f"{size}: tokens/s at {count} streams over one, {kind}"
            target = Target(at_least=bound)
            result.add(found, found.ratio(what, f"{count} streams", "1 streams", figure, "tokens/s", target))
    result.rows += [
        found.value(
            f"{size}: second turn after {HISTORY} tokens, time to first token over the first's", "turns", "ratio",
            "ratio", Target(at_most=0.25),
        ),
        found.value(
            f"{size}: growth of the p99 gap of 8 streams beside a prompt of {INTRUDER:,} tokens", "guest", "growth",
            "ratio", Target(at_most=2.0),
        ),
        found.value(f"{size}: time to first token of that prompt", "guest", "long_prompt_ttft_ms", "ms"),
    ]  # fmt: skip
    result.details[size] = found.rounds


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SHORT))
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--tokens", type=int, help="of each reply (default 128; 96 with --quick)")
    arguments.add_argument("--budget", type=float, help="seconds for each size")
    given = arguments.parse_args()
    some = [] if given.sizes == list(SHORT) else given.sizes
    title = "What sharing a forward pass is worth: the bare engine"
    title += f", {' and '.join(some)} parameters" if some else ""
    result = Result.begin("_".join(["batch_scaling", *some]), title, given)
    result.settings |= {"threads": given.threads, "new_tokens": given.tokens or (96 if given.quick else 128)}
    for size in given.sizes:
        one_size(size, given, result)
        result.write()


if __name__ == "__main__":
    main()
