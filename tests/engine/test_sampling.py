"""Sampling in full: against formulas, against a forward pass of its own, and through the engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.generation import logits_process

from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import Delta, FinishReason, GenerationRequest, Message, Options
from serve_app.engines.reply import Picked
from serve_app.engines.sampling import Sampler, narrowed
from serve_app.engines.transformers import TransformersEngine
from tests.engine import tiny_models

Make = Callable[..., Awaitable[TransformersEngine]]
Ask = Callable[..., Awaitable[Any]]
LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def sampler(**options: Any) -> Sampler:
    return Sampler(Options(**({"temperature": 0.0} | options)), GenerationConfig(), (3,), prompt_length=2)


def drawn(made: Sampler, steps: int, logits: torch.Tensor = LOGITS) -> list[int]:
    ids = [0, 0]
    for _ in range(steps):
        ids.append(made.pick(logits, ids))
    return ids[2:]


def test_what_is_plain_may_be_done_in_one_call_for_a_batch() -> None:
    assert sampler().plain
    for options in (
        {"temperature": 1.0},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"logprobs": 0},
        {"min_tokens": 1},
    ):
        assert not sampler(**options).plain


def test_a_presence_penalty_counts_once() -> None:
    # 3 - 1.5 < 2, and 2 - 1.5 < 1: all are seen before the first comes back.
    assert drawn(sampler(presence_penalty=1.5), 5) == [1, 2, 1, 1, 1]


def test_a_frequency_penalty_counts_each_time() -> None:
    # 3, 2 -> 2.4 -> 1.8 < 2 -> 2 becomes 1.4 ...
    assert drawn(sampler(frequency_penalty=0.6), 5) == [1, 1, 2, 1, 2]


def test_a_negative_penalty_invites_repetition() -> None:
    assert drawn(sampler(frequency_penalty=-2.0, logit_bias={2: 1.5}), 3) == [2, 2, 2]


def test_bias_can_force_and_ban_tokens() -> None:
    assert drawn(sampler(logit_bias={0: 100.0}), 2) == [0, 0]
    assert drawn(sampler(logit_bias={1: -100.0}), 2) == [2, 2]


def test_bias_of_an_unknown_token_is_refused() -> None:
    with pytest.raises(InvalidInput, match="logitBias"):
        drawn(sampler(logit_bias={9: 1.0}), 1)


def test_a_repetition_penalty_counts_the_prompt_too() -> None:
    made = Sampler(Options(temperature=0.0, repetition_penalty=2.0), GenerationConfig(), (), prompt_length=1)
    assert made.needs_ids
    assert made.pick(LOGITS, [1]) == 2


def test_min_p_leaves_what_is_likely_enough() -> None:
    # p(2) = p(1) / e: above 0.3 p(1), below 0.5 p(1)
    wide = {token for seed in range(40) for token in drawn(sampler(temperature=1.0, min_p=0.3, seed=seed), 1)}
    narrow = {token for seed in range(40) for token in drawn(sampler(temperature=1.0, min_p=0.5, seed=seed), 1)}
    assert (wide, narrow) == ({1, 2}, {1})


def test_before_the_least_length_nothing_ends_the_reply() -> None:
    logits = torch.tensor([0.0, 1.0, 5.0, 9.0])
    assert drawn(sampler(min_tokens=2, stop_token_ids=(2,)), 3, logits) == [1, 1, 3]


def test_what_the_request_says_wins_over_the_checkpoint() -> None:
    defaults = GenerationConfig(repetition_penalty=5.0, min_p=0.9, do_sample=True)
    assert Sampler(Options(temperature=0.0), defaults, (), 1).pick(LOGITS, [1]) == 2
    assert Sampler(Options(temperature=0.0, repetition_penalty=1.0), defaults, (), 1).pick(LOGITS, [1]) == 1


def test_log_probabilities_are_those_of_the_model_whatever_is_done_to_them() -> None:
    told: list[Picked] = []
    options = Options(temperature=0.0, logprobs=2, logit_bias={0: 100.0}, presence_penalty=1.0)
    Sampler(options, GenerationConfig(), (), 0, logprobs=told).pick(LOGITS, [])
    expected = torch.log_softmax(LOGITS, -1)
    assert told[0].token == 0 and math.isclose(told[0].logprob, float(expected[0]), rel_tol=1e-6)
    assert [token for token, _ in told[0].top] == [1, 2]
    assert told[0].top[0][1] == pytest.approx(float(expected[1]))


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.05, 0.0), (0, 1.0, 0.2), (40, 0.8, 0.1), (9000, 0.999, 0.0)],
)
def test_what_is_drawn_from_is_what_generate_draws_from(spread: float, top_k: int, top_p: float, min_p: float) -> None:
    scores = spread * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    expected = scores[None]
    for warper in (
        *([logits_process.TopKLogitsWarper(top_k)] if top_k else []),
        *([logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([logits_process.MinPLogitsWarper(min_p)] if min_p else []),
    ):
        expected = warper(None, expected)
    weights, tokens = narrowed(scores, top_k, top_p, min_p)
    found = weights if tokens is None else torch.zeros(5000).scatter(0, tokens, weights)
    difference = (found / found.sum() - expected[0].softmax(-1)).abs()
    # Two ways of adding up may disagree about the one token at the border.
    assert int((difference > 1e-3).sum()) == 0 and int(((found > 0) != expected[0].isfinite()).sum()) <= 1


async def test_log_probabilities_equal_a_forward_pass(make_engine: Make, store: Path) -> None:
    engine = await make_engine("chat", max_concurrency=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(store / "chat").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(store / "chat")

    async def check(text: str, **options: Any) -> None:
        request = GenerationRequest(
            "r", "chat", (Message.of("user", text),), Options(max_tokens=12, logprobs=3, **options)
        )
        prompt = engine._prompter.build(request).ids
        deltas = [item async for item in engine.generate(request) if isinstance(item, Delta)]
        told = [entry for delta in deltas for entry in delta.logprobs]
        ids = [token for delta in deltas for token in delta.token_ids]
        assert [entry.token_id for entry in told] == ids and ids
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
        expected = torch.log_softmax(logits.float(), -1)
        for place, entry in enumerate(told, start=len(prompt) - 1):
            assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-3)
            values, places = expected[place].topk(3)
            assert [other.token_id for other in entry.top] == places.tolist()
            assert [other.logprob for other in entry.top] == pytest.approx(values.tolist(), abs=1e-3)
        whole = b"".join(entry.data for entry in told if entry.token_id > 4)
        assert whole.decode("utf-8", "replace") == tokenizer.decode(ids, skip_special_tokens=True)

    await asyncio.gather(
        check("Hello", temperature=0.0),
        check("The quick brown fox", temperature=1.3, seed=1, frequency_penalty=1.0),
        check("1 2 3", temperature=0.7, seed=2, top_p=0.5, logit_bias={7: 3.0}),
    )


async def test_a_stop_token_ends_the_reply_and_is_no_text(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat")
    whole = await ask(engine, "Hello")
    short = await ask(engine, "Hello", stop_token_ids=(whole.ids[3],))
    first = whole.ids.index(whole.ids[3])
    assert short.ids == whole.ids[: len(short.ids)] and len(short.ids) <= first
    assert short.finish.reason is FinishReason.STOP and short.finish.usage.completion_tokens == first + 1


async def test_an_unknown_token_in_the_bias_ends_that_request_alone(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat", max_concurrency=8)
    alone = (await ask(engine, "Hello", max_tokens=30)).text
    good = [asyncio.create_task(ask(engine, "Hello", max_tokens=30)) for _ in range(7)]
    with pytest.raises(InvalidInput, match="logitBias"):
        await ask(engine, "Hello", logit_bias={100_000: 1.0})
    assert {reply.text for reply in await asyncio.gather(*good)} == {alone}


async def test_seeds_repeat_with_all_options_together(tmp_path: Path, make_engine: Make, ask: Ask) -> None:
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", eos_token_id=None))
    options: dict[str, Any] = {
        "temperature": 1.2, "top_p": 0.95, "top_k": 80, "min_p": 0.01, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {9: 2.0}, "min_tokens": 5, "seed": 11,
    }  # fmt: skip
    first = await ask(engine, "Hello", **options)
    assert (await ask(engine, "Hello", **options)).ids == first.ids
    assert (await ask(engine, "Hello", **(options | {"seed": 12}))).ids != first.ids
