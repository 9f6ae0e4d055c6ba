"""What sharing a forward pass is worth: the bare engine, in one process, without HTTP.

``python -m benchmarks.scenarios.batch_scaling`` makes random-weight Llamas of about 5, 30 and 90 million parameters,
runs 1, 8 and 32 streams in interleaved rounds, then measures the second turn of a long conversation and the gap between
the tokens of running streams while a long prompt is read beside them; it prints tables and writes
``benchmarks/results/batch_scaling.json``. Every figure is the median of the rounds, with the least and the most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from serve_app.domain.generation import Delta, Finish, GenerationRequest, Message, Options, Usage
from serve_app.engines.base import Engine, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.registry import create

RESULTS = Path(__file__).resolve().parents[1] / "results" / "batch_scaling.json"
CONTEXT = 4096
WORDS = 8000
SIZES: dict[str, dict[str, int]] = {
    "5M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6},
    "30M": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 10, "num_attention_heads": 7},
    "90M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 12},
}
STREAMS = (1, 8, 32)
HISTORY, INTRUDER = 1500, 2000


def make_model(path: Path, sizes: dict[str, int]) -> int:
    """A Llama with random weights that ends no reply, and a tokenizer of whole words; its number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=CONTEXT, num_key_value_heads=sizes["num_attention_heads"],
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(path)
    return int(model.num_parameters())


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
    return " ".join(f"w{rng.randrange(1, WORDS)}" for _ in range(count))


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
            if entered < after < left
        )
        return gaps[int(len(gaps) * 0.99)], guest.ttft if guest else 0.0

    before = engine.counters().completion_tokens
    alone, _ = await run(False)
    before = engine.counters().completion_tokens
    beside, ttft = await run(True)
    return alone, beside, ttft


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def scaling(speeds: dict[int, list[float]]) -> dict[str, dict[str, float]]:
    """Many streams against one, round by round."""
    return {
        str(streams): spread([many / one for one, many in zip(speeds[1], speeds[streams], strict=True)])
        for streams in STREAMS[1:]
    }


async def measure(name: str, folder: Path, threads: int, rounds: int, tokens: int) -> dict[str, Any]:
    path = folder / name
    parameters = make_model(path, SIZES[name])
    options = EngineOptions(threads=threads, max_concurrency=max(STREAMS))
    engine = await asyncio.to_thread(create, "transformers", inspect(path, name), options)
    rng = random.Random(7)
    speeds: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    decoding: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    turns: list[tuple[float, float, int]] = []
    gaps: list[tuple[float, float, float]] = []
    await throughput(engine, rng, 2, 8)
    for _ in range(rounds):
        for streams in STREAMS:
            whole, steady = await throughput(engine, rng, streams, tokens)
            speeds[streams].append(whole)
            decoding[streams].append(steady)
        turns.append(await second_turn(engine, rng))
        gaps.append(await disturbed(engine, rng, 8, 2 * tokens))
    await engine.close()
    return {
        "parameters": parameters,
        "engine": engine.description,
        "tokens_per_s": {str(streams): spread(found) for streams, found in speeds.items()},
        "scaling": scaling(speeds),
        "decode_tokens_per_s": {str(streams): spread(found) for streams, found in decoding.items()},
        "decode_scaling": scaling(decoding),
        "first_turn_s": spread([first for first, _, _ in turns]),
        "second_turn_ratio": spread([second / first for first, second, _ in turns]),
        "second_turn_cached_tokens": turns[0][2],
        "p99_gap_alone_s": spread([alone for alone, _, _ in gaps]),
        "p99_gap_growth": spread([beside / alone for alone, beside, _ in gaps]),
        "long_prompt_ttft_s": spread([ttft for _, _, ttft in gaps]),
    }


def show(name: str, found: dict[str, Any]) -> str:
    lines = [f"{name} ({found['parameters'] / 1e6:.1f} M)"]
    for kind, title in (("", "prompts included"), ("decode_", "decoding only")):
        speeds = ", ".join(f"{n}: {speed['median']:.0f}" for n, speed in found[f"{kind}tokens_per_s"].items())
        ratios = ", ".join(f"{n}: {ratio['median']:.1f}x" for n, ratio in found[f"{kind}scaling"].items())
        lines.append(f"    tokens/s by streams, {title}: {speeds} ({ratios})")
    lines.append(
        f"    second turn {found['second_turn_ratio']['median']:.2f} of the first "
        f"({found['first_turn_s']['median'] * 1000:.0f} ms), {found['second_turn_cached_tokens']} tokens reused"
    )
    lines.append(
        f"    p99 gap {found['p99_gap_alone_s']['median'] * 1000:.0f} ms, x{found['p99_gap_growth']['median']:.1f} "
        f"beside a prompt of {INTRUDER} tokens, which takes {found['long_prompt_ttft_s']['median']:.1f} s"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "threads": given.threads,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "rounds": given.rounds,
        "new_tokens": given.tokens,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sizes:
            found = asyncio.run(measure(name, Path(folder), given.threads, given.rounds, given.tokens))
            results["models"][name] = found
            print(show(name, found), flush=True)  # noqa: T201
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
