"""Replies of real models that broke off, gone on with: every way of decoding, characters cut in two, reasoning."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image as Pillow

from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import CapabilityMissing
from serve_app.domain.generation import (
    Accepted,
    Delta,
    Finish,
    FinishReason,
    GenerationRequest,
    Image,
    Item,
    Message,
    Options,
)
from serve_app.engines.transformers import TransformersEngine, detokenizers
from tests.engine import tiny_models

Make = Callable[..., Awaitable[TransformersEngine]]
THINKING = tiny_models.CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n") + (
    "{# what stands before </think> is left out #}"
)
TRIMS = tiny_models.CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
FORGETS = tiny_models.CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('.') | last }}")


def asking(*messages: Message, **options: Any) -> GenerationRequest:
    turns = messages or (Message.of("user", "Hello"),)
    return GenerationRequest("r", "m", turns, Options(**({"max_tokens": 24, "temperature": 0.0} | options)))


async def collect(engine: TransformersEngine, request: GenerationRequest) -> list[Item]:
    return [item async for item in engine.generate(request)]


def told(items: list[Item]) -> Delta:
    return Delta.joined([item for item in items if isinstance(item, Delta)])


def after(items: list[Item], deltas: int) -> Continuation:
    """What is known when so many deltas were given away."""
    accepted = items[0]
    assert isinstance(accepted, Accepted)
    given = Delta.joined([item for item in items if isinstance(item, Delta)][:deltas])
    return Continuation(given.text, given.token_ids, accepted.revision, spent=len(given.token_ids))


async def assert_goes_on(engine: TransformersEngine, request: GenerationRequest) -> None:
    whole = await collect(engine, request)
    all_of_it = told(whole)
    deltas = sum(isinstance(item, Delta) for item in whole)
    assert deltas > 2
    for count in range(1, deltas + 1):
        begun = after(whole, count)
        rest = told(await collect(engine, replace(request, continuation=begun)))
        assert begun.text + rest.text == all_of_it.text
        assert begun.token_ids + rest.token_ids == all_of_it.token_ids


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba"])
async def test_every_way_of_decoding_goes_on_from_ids(family: str, tmp_path: Path, make_engine: Make) -> None:
    configs = {
        "llama": lambda: transformers.LlamaConfig(**tiny_models.SIZES),
        "bloom": lambda: transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
    }
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", configs[family](), seed=1, eos_token_id=None))
    await assert_goes_on(engine, asking())
    await assert_goes_on(engine, asking(temperature=1.3, seed=4, repetition_penalty=1.2, min_tokens=20))


async def test_an_encoder_decoder_goes_on_from_ids_but_not_from_text(tmp_path: Path, make_engine: Make) -> None:
    engine = await make_engine(tiny_models.save_t5(tmp_path / "t5", eos_token_id=None))
    await assert_goes_on(engine, asking())
    with pytest.raises(CapabilityMissing):
        await collect(engine, replace(asking(), continuation=Continuation("Hello")))


@pytest.mark.parametrize("save", [tiny_models.save_llava, tiny_models.save_idefics])
async def test_a_reply_about_an_image_goes_on(save: Any, tmp_path: Path, make_engine: Make) -> None:
    engine = await make_engine(save(tmp_path / "vision"))
    out = io.BytesIO()
    Pillow.new("RGB", (20, 20), "blue").save(out, "PNG")
    image = Message.of("user", "What is this?", (Image("image/png", out.getvalue()),))
    await assert_goes_on(engine, asking(image, min_tokens=24))


async def test_a_character_may_lie_across_the_seam(make_engine: Make, tmp_path: Path) -> None:
    """What was made of a character before the break is made again: no half of one is ever given away."""
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", eos_token_id=None))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    face = tokenizer("🙂é")["input_ids"]
    bias = dict.fromkeys(face, 20.0)
    request = asking(temperature=1.5, seed=2, logit_bias=bias, max_tokens=60)
    assert any(len(piece.encode()) > 1 for piece in told(await collect(engine, request)).text)
    await assert_goes_on(engine, request)


async def test_reasoning_and_answer_go_on_apart(make_engine: Make, tmp_path: Path) -> None:
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", template=THINKING))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer("Hm, so.\n</think>\n\nYes 🙂.")["input_ids"]
    request = asking()
    prompt = engine._prompter.build(request)

    def fresh() -> Any:
        return engine._prompter.stream(request, prompt, detokenizers(tokenizer)(()))

    deltas: list[Delta] = []
    reference = fresh()
    for token in ids:
        if (delta := reference.push(token)) is not None:
            deltas.append(delta)
    last = reference.finish()
    for count in range(1, len(deltas) + 1):
        given = Delta.joined(deltas[:count])
        stream = fresh()
        stream.replay(given.token_ids)
        rest = [stream.push(token) for token in ids[len(given.token_ids) :]]
        both = Delta.joined([given, *(delta for delta in [*rest, stream.finish()] if delta is not None)])
        whole = Delta.joined([*deltas, *([last] if last else [])])
        assert (both.text, both.reasoning, both.token_ids) == (whole.text, whole.reasoning, whole.token_ids)
    assert (whole.reasoning, whole.text) == ("Hm, so.", "Yes 🙂.")


@pytest.mark.parametrize("template", [tiny_models.CHATML, TRIMS, None])
async def test_text_is_left_open_whatever_the_template_does_to_blanks(
    template: str | None, make_engine: Make, tmp_path: Path
) -> None:
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", template=template))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in ("The quick ", "\nThe", "It ends with a stop.\n\n", "你好 🙂", "x"):
        prompt = engine._prompter.build(replace(asking(), continuation=Continuation(text, spent=2)))
        assert tokenizer.decode(prompt.ids).endswith(text.strip())
        assert prompt.begun == () and prompt.max_tokens == 22
    blank = engine._prompter.build(replace(asking(), continuation=Continuation("  ", spent=1)))
    assert blank.ids == engine._prompter.build(asking()).ids


async def test_a_template_that_changes_the_text_is_said_not_to_continue(make_engine: Make, tmp_path: Path) -> None:
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", template=FORGETS))
    with pytest.raises(CapabilityMissing, match="cannot continue"):
        await collect(engine, replace(asking(), continuation=Continuation("One. Two")))
    with pytest.raises(CapabilityMissing, match="cannot continue"):
        await collect(engine, replace(asking(), continuation=Continuation("One. Two.")))


async def test_a_raw_prompt_goes_on_by_text(make_engine: Make, store: Path) -> None:
    engine = await make_engine("chat")
    raw = replace(asking(Message.of("user", "The quick")), raw=True)
    longer = engine._prompter.build(replace(asking(Message.of("user", "The quick brown")), raw=True))
    assert engine._prompter.build(replace(raw, continuation=Continuation(" brown", spent=1))).ids == longer.ids


async def test_what_was_whole_already_ends_at_once(make_engine: Make, tmp_path: Path) -> None:
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", eos_token_id=None))
    whole = await collect(engine, asking(max_tokens=8))
    begun = after(whole, 100)
    items = await collect(engine, replace(asking(max_tokens=begun.spent), continuation=begun))
    finish = items[-1]
    assert isinstance(finish, Finish) and finish.reason is FinishReason.LENGTH
    assert not told(items).text and finish.usage.completion_tokens == 0
    assert engine.counters().waiting == engine.counters().running == 0 and engine.counters().finished == 2


async def test_neighbours_do_not_matter(make_engine: Make, tmp_path: Path) -> None:
    path = tiny_models.save_causal(tmp_path / "m", eos_token_id=None)
    engine = await make_engine(path, max_concurrency=6)
    requests = [asking(Message.of("user", f"Hello {n}"), max_tokens=40) for n in range(6)]
    whole = await asyncio.gather(*(collect(engine, request) for request in requests))
    begun = [replace(request, continuation=after(items, 9)) for request, items in zip(requests, whole, strict=True)]
    fresh = await make_engine(path, max_concurrency=6)
    rests = await asyncio.gather(*(collect(fresh, request) for request in begun))
    for request, items, rest in zip(begun, whole, rests, strict=True):
        assert request.continuation and request.continuation.text + told(rest).text == told(items).text


def test_ids_are_for_their_own_revision_alone() -> None:
    begun = Continuation("abc", (1, 2), "r1", earlier=1, spent=5)
    assert begun.read_by("r1") is begun and begun.beginning == "a" and begun.spent_before == 3
    for revision in ("r2", ""):
        other = begun.read_by(revision)
        assert (other.token_ids, other.beginning, other.spent_before) == ((), "abc", 5)
