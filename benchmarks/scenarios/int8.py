"""What weights in int8 are worth on a CPU: speed and accuracy against the same model in float32, in one process.

``python -m benchmarks.scenarios.int8`` measures 1 and 8 streams (prompts of 64 words ± 50 %, 128 new tokens) on a Llama
of 90 million random weights, and on the shipped ``tiny-chat``, whose weights were trained, how often the likeliest next
token stays the same.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path

from benchmarks.models import SIZES, ensure, model_id
from benchmarks.protocol import Contender, Result, Row, measure, parser, rounds_of
from benchmarks.scenarios.batch_scaling import throughput
from benchmarks.stats import bootstrap
from serve_app.engines.base import Engine, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.registry import create

TRAINED = Path(__file__).resolve().parents[2] / "models" / "huggingface" / "rotunda" / "tiny-chat"
KINDS: Mapping[str, tuple[tuple[str, str], ...]] = {"float32": (), "int8": (("quantize", "int8"),)}
STREAMS = (1, 8)
QUESTIONS = 200


def agreement(questions: int, seed: int) -> float:
    """The share of positions of sums in tiny-chat's own form whose likeliest next token int8 leaves as it was."""
    import torch
    import transformers

    from serve_app.engines.loading import quantize

    whole, small = (
        transformers.AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval() for _ in KINDS
    )
    quantize(small, "int8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TRAINED)
    rng, same, count = random.Random(seed), 0, 0
    for _ in range(questions):
        one, other = rng.randrange(100), rng.randrange(100)
        turns = [
            {"role": "user", "content": f"What is {one} + {other}?"},
            {"role": "assistant", "content": f"{one} + {other} = {one + other}."},
        ]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.inference_mode():
            alike = whole(ids).logits[0].argmax(-1) == small(ids).logits[0].argmax(-1)
        same, count = same + int(alike.sum()), count + alike.numel()
    return same / count


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--size", choices=SIZES, default="90M")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--tokens", type=int, help="of each reply (default 128; 48 with --quick)")
    given = arguments.parse_args()
    tokens = given.tokens or (48 if given.quick else 128)
    result = Result.begin("int8", "Weights in int8 against float32, on a CPU", given)
    result.settings |= {"threads": given.threads, "new_tokens": tokens}
    with asyncio.Runner() as runner:
        engines: dict[str, Engine] = {}
        for kind, extra in KINDS.items():
            info = inspect(ensure([given.size]) / model_id(given.size), given.size)
            engines[kind] = create(
                "transformers", info, EngineOptions(threads=given.threads, max_concurrency=max(STREAMS), extra=extra)
            )
            result.settings[kind] = engines[kind].description

        def contender(kind: str, streams: int) -> Contender:
            def one_round(seed: int) -> dict[str, float]:
                found = runner.run(throughput(engines[kind], random.Random(seed), streams, tokens))
                return {"tokens_per_s": found[0]}

            return Contender(f"{kind}, {streams}", one_round)

        contenders = [contender(kind, streams) for streams in STREAMS for kind in KINDS]
        found = measure(contenders, rounds_of(given), given.seed, "int8:")
        for streams in STREAMS:
            what = f"{given.size}, {streams} stream{'s' if streams > 1 else ''}: tokens/s, int8 against float32"
            names = (f"int8, {streams}", f"float32, {streams}")
            result.add(found, found.ratio(what, *names, "tokens_per_s", "tokens/s"))
        shares = [
            agreement(20 if given.quick else QUESTIONS, given.seed + number) for number in range(rounds_of(given))
        ]
        what = "tiny-chat: next tokens that are the likeliest in both, over sums and their answers"
        result.rows.append(Row(what, bootstrap(shares), "share"))
        result.details["rounds"] = found.rounds
        for engine in engines.values():
            runner.run(engine.close())
    result.write()


if __name__ == "__main__":
    main()
