"""The engine on a GPU: a Llama of a billion random weights in bfloat16, in one process, beside transformers itself.

``python -m benchmarks.scenarios.gpu`` measures 1, 8 and 32 streams (prompts of 128 words ± 50 %, 128 tokens, greedy)
on Rotunda's engine, on ``generate`` with all prompts in one padded batch, and on transformers' continuous batching with
its own settings; then the second turn of a long conversation and the gap between the tokens of running streams while a
long prompt is read beside them. ``--device cpu --size 5M`` shows that it runs where there is no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.arrivals import Prompts
from benchmarks.models import CONTEXT, LARGE, SIZES, ensure, model_id
from benchmarks.protocol import Contender, Figures, Measured, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.batch_scaling import HISTORY, INTRUDER, ask, disturbed, second_turn
from serve_app.engines.base import Engine, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.registry import create

STREAMS = (1, 8, 32)
OURS, PADDED, CONTINUOUS = "Rotunda's engine", "generate, one padded batch", "transformers' continuous batching"
log = logging.getLogger(__name__)


def prompts_of(seed: int, streams: int) -> list[str]:
    rng = random.Random(seed)
    return [Prompts(128, 0.5).draw(rng) for _ in range(streams)]


def figures(tokens: int, seconds: float, first: Sequence[float]) -> Figures:
    """Of a round: ``first`` holds each request's time to first token."""
    return {"tokens_per_s": tokens / seconds, "ttft_p50_ms": median(first) * 1000}


class Ours:
    """Rotunda's engine."""

    def __init__(self, size: str, device: str) -> None:
        self.runner = asyncio.Runner()
        extra = (("use_gpu", device == "cuda"), ("kv_tokens", max(STREAMS) * CONTEXT))
        options = EngineOptions(threads=1, max_concurrency=max(STREAMS), extra=extra)
        info = inspect(ensure([size]) / model_id(size), size)

        async def make() -> Engine:
            return await asyncio.to_thread(create, "transformers", info, options)

        self.engine = self.runner.run(make())

    def round(self, prompts: Sequence[str], tokens: int) -> Figures:
        async def run() -> Figures:
            begun = time.perf_counter()
            runs = await asyncio.gather(*(ask(self.engine, prompt, tokens) for prompt in prompts))
            made = sum(run.usage.completion_tokens for run in runs)
            return figures(made, time.perf_counter() - begun, [run.sent - begun + run.ttft for run in runs])

        return self.runner.run(run())

    def turns(self, seed: int) -> Figures:
        first, second, _ = self.runner.run(second_turn(self.engine, random.Random(seed)))
        return {"first_ttft_ms": first * 1000, "ratio": second / first}

    def guest(self, seed: int, tokens: int) -> Figures:
        alone, beside, ttft = self.runner.run(disturbed(self.engine, random.Random(seed), 8, tokens))
        return {"gap_p99_ms": alone * 1000, "growth": beside / alone, "long_prompt_ttft_ms": ttft * 1000}

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()


class Clock(BaseStreamer):  # type: ignore[misc]
    """When ``generate`` had each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


class Peer:
    """transformers itself with a copy of the same model."""

    def __init__(self, size: str, device: str) -> None:
        path = ensure([size]) / model_id(size)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left", pad_token="w0")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
        self.model = model.eval().to(device)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(prompts))["input_ids"]
        return found


class Padded(Peer):
    def round(self, prompts: Sequence[str], tokens: int) -> Figures:
        begun, clock = time.perf_counter(), Clock()
        inputs = self.tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            made = self.model.generate(
                **inputs.to(self.model.device), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
                streamer=clock,
            )  # fmt: skip
        whole, first = time.perf_counter() - begun, clock.times[1] - begun  # the first call hands over the prompts
        return figures((made.shape[1] - inputs["input_ids"].shape[1]) * len(prompts), whole, [first])


class Continuous(Peer):
    """Its manager stays between rounds; it is made for the largest of them."""

    def __init__(self, size: str, device: str) -> None:
        super().__init__(size, device)
        share = 0.5  # of the memory: the other engines need some too
        self.config = transformers.ContinuousBatchingConfig(max_memory_percent=share)
        self.round(prompts_of(0, max(STREAMS)), 16)

    def round(self, prompts: Sequence[str], tokens: int) -> Figures:
        generation = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        found = self.model.generate_batch(
            self.ids(prompts), generation, self.config, record_timestamps=True, persistent_manager=True
        )
        outputs = list(found.values())
        made = sum(len(output.generated_tokens) for output in outputs)
        if len(outputs) != len(prompts) or made != tokens * len(prompts):
            raise RuntimeError(f"{len(outputs)} of {len(prompts)} requests came back, {made} tokens in all")
        begun = min(output.created_time for output in outputs)
        end = max(output.timestamps[-1] for output in outputs)
        return figures(made, end - begun, [output.timestamps[0] - begun for output in outputs])


def contender(name: str, streams: int, tokens: int, one_round: Callable[[Sequence[str], int], Figures]) -> Contender:
    return Contender(
        f"{name} {streams}",
        lambda seed: one_round(prompts_of(seed, streams), tokens),
        warm_up=lambda seed: one_round(prompts_of(seed, streams), 16),
    )


def rows(found: Measured, size: str, streams: int, peers: Sequence[str]) -> list[Row]:
    at, ours = f"{size}, {streams} stream{'s' if streams > 1 else ''}", f"{OURS} {streams}"
    made = []
    for name in peers:
        bound = Target(at_least=1.0 if name == CONTINUOUS and streams > 1 else None)
        what = f"{at}: tokens/s against {name}"
        made.append(found.ratio(what, ours, f"{name} {streams}", "tokens_per_s", "tokens/s", bound))
    if peers:
        better = min(peers, key=lambda name: median(found.values(f"{name} {streams}", "ttft_p50_ms")))
        what = f"{at}: TTFT p50 against {better}, the better one"
        bound = Target(at_most=1.0 if streams > 1 else 1.25)
        made.append(found.ratio(what, ours, f"{better} {streams}", "ttft_p50_ms", "ms", bound))
    return made


def own_rows(found: Measured, size: str) -> list[Row]:
    one = f"{OURS} 1"
    scaling = [
        found.ratio(f"{size}: tokens/s at {count} streams over one", f"{OURS} {count}", one, "tokens_per_s", "tokens/s")
        for count in STREAMS[1:]
    ]
    second = f"{size}: second turn after {HISTORY} tokens, time to first token over the first's"
    growth = f"{size}: growth of the p99 gap of 8 streams beside a prompt of {INTRUDER:,} tokens"
    return [
        *scaling,
        found.value(second, "turns", "ratio", "ratio", Target(at_most=0.25)),
        found.value(growth, "guest", "growth", "ratio", Target(at_most=2.0)),
        found.value(f"{size}: p99 gap of 8 streams alone", "guest", "gap_p99_ms", "ms"),
        found.value(f"{size}: time to first token of that prompt", "guest", "long_prompt_ttft_ms", "ms"),
    ]


def peers_of(given: argparse.Namespace, result: Result) -> dict[str, Padded | Continuous]:
    made: dict[str, Padded | Continuous] = {PADDED: Padded(given.size, given.device)}
    try:
        made[CONTINUOUS] = Continuous(given.size, given.device)
    except Exception as fault:  # a peer that does not run here is named in the result
        log.exception("%s does not run", CONTINUOUS)
        result.problems.append(f"{CONTINUOUS} did not run: {type(fault).__name__}")
    return made


def main() -> None:
    arguments = parser(__doc__, rounds=4)
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments.add_argument("--size", choices=[*LARGE, *SIZES], default="1B")
    arguments.add_argument("--tokens", type=int, help="of each reply (default 128; 16 with --quick)")
    arguments.add_argument("--streams", type=int, nargs="+", default=list(STREAMS), help="beside the peers")
    arguments.add_argument("--budget", type=float, help="seconds for the rounds of each part")
    given = arguments.parse_args()
    tokens = given.tokens or (16 if given.quick else 128)
    result = Result.begin("gpu", "A Llama of a billion parameters in bfloat16 on a GPU, in one process", given)
    ours = Ours(given.size, given.device)
    result.settings |= {"new_tokens": tokens, "model": given.size, "engine": ours.engine.description}
    # First what needs no peer; it is written at once, should one of them never come back.
    alone = [contender(OURS, streams, tokens, ours.round) for streams in STREAMS]
    alone += [Contender("turns", ours.turns), Contender("guest", lambda seed: ours.guest(seed, tokens))]
    found = measure(alone, rounds_of(given), given.seed, "alone:", budget_s=given.budget)
    result.add(found, *own_rows(found, given.size))
    result.details["alone"] = found.rounds
    result.write()
    peers = peers_of(given, result)
    if CONTINUOUS in peers:
        result.settings[CONTINUOUS] = settings_of(peers[CONTINUOUS].model)
    for streams in given.streams:
        contenders = [contender(name, streams, tokens, one.round) for name, one in {OURS: ours, **peers}.items()]
        found = measure(contenders, rounds_of(given), given.seed, f"{streams} streams:", budget_s=given.budget)
        result.add(found, *rows(found, given.size, streams, list(peers)))
        result.details[f"{streams}"] = found.rounds
        result.write()
    ours.close()


def settings_of(model: Any) -> str:
    """What continuous batching chose for itself."""
    manager = model._cached_continuous_batching_manager
    chosen = manager.continuous_batching_config
    graphs, ahead = chosen.use_cuda_graph, chosen.use_async_batching
    return f"CUDA graphs {graphs}, asynchronous {ahead}, pages of {chosen.page_size}, {chosen.max_batch_tokens} tokens"


if __name__ == "__main__":
    main()
