"""Speed against what people would use instead: the same weights, prompts, dtype and threads over HTTP.

``python -m benchmarks.scenarios.engine`` runs 1, 8 and 32 streams (prompts of 128 words ± 50 %, 128 new tokens, greedy)
on Llamas of about 5, 30 and 90 million random weights through the whole of Rotunda, `transformers serve` in its default
and its continuous-batching mode, llama.cpp's server, and Rotunda's engine alone in one process.
Peers that are not installed are left out, and the result says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.arrivals import Planned, Prompts, plan
from benchmarks.client import Load
from benchmarks.metrics import Sample, metrics
from benchmarks.models import SIZES, ensure, model_id
from benchmarks.profiling import lines, profile_under
from benchmarks.protocol import Contender, Measured, Result, Row, Target, measure, parser, rounds_of
from benchmarks.servers import PeerMissing, Server, llama_cpp, on, rotunda, transformers_serve
from benchmarks.wire import now

STREAMS = (1, 8, 32)
DEFAULT, CONTINUOUS, LLAMA, BARE = "transformers serve", "transformers serve CB", "llama.cpp", "bare engine"


class BareEngine:
    """Rotunda's engine in this process, without Ray and HTTP."""

    def __init__(self, store: Path, size: str, threads: int) -> None:
        from serve_app.engines.base import EngineOptions
        from serve_app.engines.discovery import inspect
        from serve_app.engines.registry import create

        self._runner = asyncio.Runner()
        self._name = model_id(size)
        info = inspect(store / self._name, self._name)
        options = EngineOptions(threads=threads, max_concurrency=max(STREAMS))

        async def make() -> Any:
            return await asyncio.to_thread(create, "transformers", info, options)

        self._engine = self._runner.run(make())

    def __enter__(self) -> BareEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    def load(self, planned: Sequence[Planned]) -> dict[str, Any]:
        """All of ``planned`` at once; the metrics."""
        return self._runner.run(self._load(planned))

    async def _load(self, planned: Sequence[Planned]) -> dict[str, Any]:
        started = now()
        samples = await asyncio.gather(*(self._one(index, one, started) for index, one in enumerate(planned)))
        return metrics(samples, now() - started)

    async def _one(self, index: int, planned: Planned, started: float) -> Sample:
        from serve_app.domain.generation import Delta, Finish, GenerationRequest, Message, Options

        options = Options(temperature=0.0, max_tokens=planned.max_tokens)
        message = (Message.of("user", planned.prompt),)
        request = GenerationRequest(f"{started}-{index}", self._name, message, options, raw=True)
        times, usage = [], None
        async for item in self._engine.generate(request):
            if isinstance(item, Delta):
                times.append(now())
            elif isinstance(item, Finish):
                usage = item.usage
        assert usage is not None
        return Sample(
            self._name, started, started, tuple(times), now(), 200, None, usage.prompt_tokens, usage.completion_tokens,
            planned.max_tokens,
        )  # fmt: skip


def requests(model: str, streams: int, tokens: int, seed: int) -> list[Planned]:
    """As many requests as streams: prompts of 128 words ± 50 %, new in every round."""
    return plan([model], streams, seed=seed, max_tokens=tokens, prompts=Prompts(128, 0.5))


def figures(found: dict[str, Any], name: str, tokens: int) -> dict[str, float]:
    if found["failed"]:
        raise RuntimeError(f"{name}: {found['errors']}")
    if found["total_output_tokens"] != found["num_prompts"] * tokens:
        raise RuntimeError(f"{name} made {found['total_output_tokens']} tokens of {found['num_prompts'] * tokens}")
    wanted = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "tokens_per_chunk")
    return {name: found[name] for name in wanted}


def served(server: Server, streams: int, tokens: int, most_rounds: int | None = None) -> Contender:
    def one_round(seed: int, length: int = tokens) -> dict[str, float]:
        planned = requests(server.model, streams, length, seed)
        run = asyncio.run(Load(server.url, server.surface, concurrency=streams).run(planned))
        return figures(run.metrics(), server.name, length)

    return Contender(server.name, one_round, server.processes, lambda seed: one_round(seed, 16), most_rounds)


def profiled(server: Server, streams: int, tokens: int, seconds: float = 15.0) -> dict[str, dict[str, float]]:
    """Where the replica's time goes while rounds of ``streams`` streams follow each other."""
    contender, seeds = served(server, streams, tokens), count()

    def replicas() -> list[psutil.Process]:
        return [process for process in server.processes() if "ServeReplica:model-" in " ".join(process.cmdline())]

    return profile_under(lambda: contender.measure(next(seeds)), replicas, seconds, top=40)


def bare(engine: BareEngine, streams: int, tokens: int) -> Contender:
    def one_round(seed: int, length: int = tokens) -> dict[str, float]:
        return figures(engine.load(requests("", streams, length, seed)), BARE, length)

    return Contender(BARE, one_round, warm_up=lambda seed: one_round(seed, 16))


def rows(found: Measured, size: str, streams: int, ours: str, stored: str) -> list[Row]:
    """The lines of the table for one size and number of streams, for those peers that ran."""
    at = f"{size}, {streams} stream{'s' if streams > 1 else ''}"
    speed, first = "output_throughput", "median_ttft_ms"
    many, small = streams > 1, size == "5M"
    made = []
    if DEFAULT in found.rounds:
        bound = Target(at_least=1.5 if many else None)
        made.append(found.ratio(f"{at}: tokens/s against {DEFAULT}", ours, DEFAULT, speed, "tokens/s", bound))
    if CONTINUOUS in found.rounds:
        bound = Target(at_least=(1.2 if small else 1.0) if many else None)
        made.append(found.ratio(f"{at}: tokens/s against {CONTINUOUS}", ours, CONTINUOUS, speed, "tokens/s", bound))
    if peers := [name for name in (DEFAULT, CONTINUOUS) if name in found.rounds]:
        better = min(peers, key=lambda name: median(found.values(name, first)))
        bound = Target(at_most=1.0 if many else 1.25)
        made.append(found.ratio(f"{at}: TTFT p50 against {better}, the better one", ours, better, first, "ms", bound))
    if LLAMA in found.rounds:
        bound = Target(at_least=1.0 if streams == 8 else None)
        made.append(found.ratio(f"{at}: tokens/s against {LLAMA}", ours, LLAMA, speed, "tokens/s", bound))
    if BARE in found.rounds and many:
        bound = Target(at_least=0.7 if small else 0.9)
        for name in (ours, stored):
            what = f"{at}: tokens/s through everything ({name}) against the bare engine"
            made.append(found.ratio(what, name, BARE, speed, "tokens/s", bound))
    return made


Starter = Callable[[str, int], AbstractContextManager[Server]]
PEERS: dict[str, Starter] = {
    DEFAULT: lambda size, threads: transformers_serve(size, continuous=False, threads=threads),
    CONTINUOUS: lambda size, threads: transformers_serve(size, continuous=True, threads=threads),
    LLAMA: lambda size, threads: llama_cpp(size, threads=threads),
}


def one_size(size: str, given: Any, result: Result) -> None:
    tokens = result.settings["new_tokens"] = given.tokens or (16 if given.quick else 128)
    with ExitStack() as stack:
        model = {
            "model": model_id(size), "num_cpus": given.threads, "min_replicas": 1, "max_concurrency": max(STREAMS),
        }  # fmt: skip
        ours = stack.enter_context(rotunda([model], sizes=[size], surface="completions"))
        stored = on(ours, "sse")
        peers = []
        for name in given.peers:
            try:
                peers.append(stack.enter_context(PEERS[name](size, given.threads)))
            except PeerMissing as missing:
                result.problems.append(str(missing))
        engine = stack.enter_context(BareEngine(ensure([size]), size, given.threads)) if not given.no_bare else None
        result.settings["peers"] = {peer.name: peer.settings for peer in peers}
        for streams in given.streams:
            slow = {DEFAULT: given.slow_rounds} if streams > 1 else {}
            contenders = [served(server, streams, tokens, slow.get(server.name)) for server in (ours, *peers)]
            if engine is not None and streams > 1:
                contenders += [served(stored, streams, tokens), bare(engine, streams, tokens)]
            title = f"{size}, {streams} streams:"
            found = measure(contenders, rounds_of(given), given.seed, title, budget_s=given.budget)
            result.add(found, *rows(found, size, streams, ours.name, stored.name))
            result.details[f"{size}/{streams}"] = {
                name: list(map(dict, rounds)) for name, rounds in found.rounds.items()
            }
            if given.profile:
                print("\n".join(lines(profiled(ours, streams, tokens))))  # noqa: T201
            result.write()  # after each: a large model's rounds take minutes, and what there is should not be lost


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    arguments.add_argument("--tokens", type=int, help="of each reply (default 128; 16 with --quick)")
    arguments.add_argument("--threads", type=int, default=1, help="of every engine (default %(default)s)")
    arguments.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    arguments.add_argument("--no-bare", action="store_true", help="leave out the engine alone")
    slow = "of transformers' default mode at 8 and 32 streams, which takes minutes (default: as the others)"
    arguments.add_argument("--slow-rounds", type=int, help=f"rounds {slow}")
    arguments.add_argument("--budget", type=float, help="seconds for each size and number of streams")
    arguments.add_argument("--profile", action="store_true", help="also print where the replica's time goes (py-spy)")
    given = arguments.parse_args()
    # The largest model takes so long that its numbers of streams are measured one at a time, into files of their own.
    some = [] if given.streams == list(STREAMS) else [str(streams) for streams in given.streams]
    for size in given.sizes:
        title = f"A Llama of {size} parameters against peers, over HTTP"
        title += f": {' and '.join(some)} streams" if some else ""
        result = Result.begin("_".join(["engine", size, *some]), title, given)
        result.settings |= {"threads": given.threads, "prompt": "128 words ± 50 %"}
        one_size(size, given, result)


if __name__ == "__main__":
    main()
