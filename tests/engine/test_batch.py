"""Micro-batches against ``generate``: what the slots refuse still shares passes, and nobody harms a neighbour."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image as Pillow

from serve_app.domain.errors import GenerationFailed
from serve_app.domain.generation import Delta, GenerationRequest, Image, Message, Options
from serve_app.engines import batch, gate
from serve_app.engines.batch import BatchDecoder
from serve_app.engines.decoding import Passes
from serve_app.engines.transformers import TransformersEngine
from tests.engine import tiny_models

Make = Callable[..., Awaitable[TransformersEngine]]
Ask = Callable[..., Awaitable[Any]]
Together = Callable[..., Awaitable[list[Any]]]
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog.", "0 1 2 3 4 5", "I am fine, thank you."]
SMALL = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "falcon, alibi": lambda: transformers.FalconConfig(
        **SMALL, num_hidden_layers=2, alibi=True, new_decoder_architecture=False
    ),
    "falcon, rope": lambda: transformers.FalconConfig(
        **SMALL, num_hidden_layers=2, alibi=False, new_decoder_architecture=False, multi_query=False
    ),
    "gpt-j": lambda: transformers.GPTJConfig(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=8
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
    "llama, dynamic rope": lambda: transformers.LlamaConfig(
        **tiny_models.SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step."""
    seen: list[int] = []
    original = Passes.next

    def counted(self: Passes, tokens: Any, arguments: Any) -> Any:
        seen.append(len(tokens))
        return original(self, tokens, arguments)

    monkeypatch.setattr(Passes, "next", counted)
    monkeypatch.setattr(batch, "WASTE", 10.0)  # tiny prompts differ more than real ones
    return seen


def picture(color: str) -> Image:
    out = io.BytesIO()
    Pillow.new("RGB", (28, 28), color).save(out, "PNG")
    return Image("image/png", out.getvalue())


@pytest.mark.parametrize("family", FAMILIES)
async def test_who_waits_together_shares_passes_and_gets_the_tokens_of_generate(
    family: str, tmp_path: Path, make_engine: Make, ask: Ask, passes: list[int], together: Together
) -> None:
    path = tiny_models.save_causal(tmp_path / "m", FAMILIES[family](), eos_token_id=None)
    engine = await make_engine(path, max_concurrency=8)
    assert "micro-batches of up to 8 (" in engine.description
    passes.clear()
    replies = await together(engine, *(ask(engine, prompt) for prompt in PROMPTS))
    assert max(passes) >= 3
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = engine._prompter.build(GenerationRequest("r", "m", (Message.of("user", prompt),))).ids
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0][len(ids) :].tolist()
        special = set(range(len(tiny_models.SPECIAL)))
        expected = [token for token in made if token not in special]
        assert [token for token in reply.ids if token not in special] == expected[: len(reply.ids)]
        assert reply.finish.usage.completion_tokens == 12


async def test_an_encoder_reads_texts_of_different_lengths_together(
    tmp_path: Path, make_engine: Make, ask: Ask, passes: list[int], together: Together
) -> None:
    engine = await make_engine(tiny_models.save_t5(tmp_path / "m", eos_token_id=None), max_concurrency=8)
    assert "micro-batches of up to 8 (it has an encoder)" in engine.description
    alone = [(await ask(engine, prompt)).ids for prompt in PROMPTS]
    passes.clear()
    assert [reply.ids for reply in await together(engine, *(ask(engine, prompt) for prompt in PROMPTS))] == alone
    assert max(passes) >= 3


@pytest.mark.parametrize("save", [tiny_models.save_llava, tiny_models.save_idefics])
async def test_pictures_of_one_shape_are_read_together_each_with_its_own_text(
    save: Callable[..., Path], tmp_path: Path, make_engine: Make, ask: Ask, passes: list[int], together: Together,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As with layers that see a window: their caches do not fit the slots."""
    monkeypatch.setattr(gate, "refusal", lambda model: "for the test")
    engine = await make_engine(save(tmp_path / "m"), max_concurrency=8)
    pictures = [picture(color) for color in ("red", "blue", "green")]
    asked = [
        Message.of("user", prompt, (image,)) for prompt, image in zip(PROMPTS, [*pictures, pictures[0]], strict=True)
    ]
    alone = [(await ask(engine, message)).ids for message in asked]
    passes.clear()
    replies = await together(engine, *(ask(engine, message) for message in [*asked, "and no picture"]))
    assert [reply.ids for reply in replies][:-1] == alone
    assert max(passes) >= 3


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_causal(tmp_path_factory.mktemp("store") / "bloom", FAMILIES["bloom"](), eos_token_id=None)


async def test_who_leaves_is_dropped_from_the_passes_and_the_others_go_on(
    bloom: Path, make_engine: Make, ask: Ask, passes: list[int], together: Together
) -> None:
    engine = await make_engine(bloom, max_concurrency=8)
    alone = (await ask(engine, "Hello 3", max_tokens=40)).text
    passes.clear()
    asked = [ask(engine, f"Hello {n}", max_tokens=5 if n < 3 else 40) for n in range(4)]
    assert (await together(engine, *asked))[3].text == alone
    assert max(passes) >= 3 and passes[-1] == 1

    async def leave() -> None:
        options = Options(temperature=0.0, max_tokens=40)
        async for item in engine.generate(GenerationRequest("r", "m", (Message.of("user", "Hello 0"),), options)):
            if isinstance(item, Delta):
                return

    replies = await together(engine, ask(engine, "Hello 3", max_tokens=40), *(leave() for _ in range(3)))
    assert replies[0].text == alone
    now = engine.counters()
    assert (now.running, now.cancelled) == (0, 3) and now.tokens_after_cancel <= 3


async def test_options_stay_each_requests_own(
    bloom: Path, make_engine: Make, ask: Ask, passes: list[int], together: Together
) -> None:
    engine = await make_engine(bloom, max_concurrency=8)
    greedy = await ask(engine, "Hello")
    stop = greedy.text[4:7]

    async def mixed() -> list[Any]:
        return await together(
            engine,
            ask(engine, "Hello", stop=(stop,)),
            ask(engine, "Hello", temperature=1.5, seed=7),
            ask(engine, "Hello", max_tokens=3),
            ask(engine, "Hello"),
        )

    first = await mixed()
    assert first[0].text == greedy.text[: greedy.text.index(stop)] and first[0].finish.stop == stop
    assert first[1].text != greedy.text
    assert first[2].finish.usage.completion_tokens == 3
    assert first[3].text == greedy.text
    assert [reply.text for reply in await mixed()] == [reply.text for reply in first]


async def test_a_prompt_that_breaks_the_pass_fails_alone(
    bloom: Path, make_engine: Make, ask: Ask, monkeypatch: pytest.MonkeyPatch, passes: list[int], together: Together
) -> None:
    engine = await make_engine(bloom, max_concurrency=8)
    alone = (await ask(engine, "Hello")).text
    bad = engine._prompter.build(GenerationRequest("r", "m", (Message.of("user", "666"),))).ids
    original = Passes.first

    def first(self: Passes, texts: Any) -> Any:
        if any(text.ids == bad for text in texts):
            raise RuntimeError("index out of range in /secret")
        return original(self, texts)

    monkeypatch.setattr(Passes, "first", first)
    outcomes = await together(engine, *(ask(engine, text) for text in ("Hello", "666", "Hello")))
    assert isinstance(outcomes[1], GenerationFailed) and "secret" not in outcomes[1].message
    assert [outcomes[0].text, outcomes[2].text] == [alone, alone]


async def test_a_model_that_padding_would_spoil_gets_a_pass_for_each_request(
    bloom: Path, make_engine: Make, ask: Ask, monkeypatch: pytest.MonkeyPatch, together: Together
) -> None:
    monkeypatch.setattr(Passes, "check_padding", lambda self, ids: False)
    engine = await make_engine(bloom)
    assert isinstance(engine._worker._decoder, BatchDecoder)
    assert "a pass per request (it uses ALiBi, and in padded batches" in engine.description
    assert {reply.text for reply in await together(engine, *(ask(engine, "Hello") for _ in range(3)))} == {
        (await ask(engine, "Hello")).text
    }
