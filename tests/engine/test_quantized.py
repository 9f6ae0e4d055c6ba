"""Weights in int8: close to the model, smaller, and refused where they cannot be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from serve_app.domain.errors import InvalidConfig
from serve_app.engines import memory
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.loading import load, quantize
from serve_app.engines.transformers import TransformersEngine
from tests.engine import tiny_models

Ask = Callable[..., Awaitable[Any]]
TINY_CHAT = Path(__file__).parents[2] / "models" / "huggingface" / "rotunda" / "tiny-chat"
INT8 = EngineOptions(extra=(("quantize", "int8"),))

pytest.importorskip("torchao")


def held_bytes(model: Any) -> int:
    """Of the weights, each storage once."""
    found = {}
    for tensor in (*model.parameters(), *model.buffers()):
        parts = [tensor.qdata, tensor.scale] if hasattr(tensor, "qdata") else [tensor]
        found |= {part.data_ptr(): part.numel() * part.element_size() for part in parts}
    return sum(found.values())


def test_a_quantized_model_computes_nearly_the_same_in_less_memory() -> None:
    whole = transformers.AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32).eval()
    small = transformers.AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32).eval()
    before = held_bytes(small)
    quantize(small, "int8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_CHAT)
    ids = tokenizer("What is 17 + 25? My name is Zorana.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected, found = whole(ids).logits[0], small(ids).logits[0]
    assert float((found - expected).abs().mean()) < 0.05 * float(expected.std())
    assert held_bytes(small) < 0.5 * before


async def test_the_shipped_model_still_answers_right(ask: Ask) -> None:
    from serve_app.engines.transformers import create

    engine: TransformersEngine = create(inspect(TINY_CHAT, "tiny-chat"), INT8)
    try:
        assert "int8 weights" in engine.description and "continuous batching" in engine.description
        assert (await ask(engine, "What is 17 + 25?", max_tokens=20)).text == "17 + 25 = 42."
    finally:
        await engine.close()


def test_what_it_will_hold_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    info = inspect(tiny_models.save_causal(tmp_path / "m"), "m")
    need = memory.needed_bytes(info, INT8)
    assert need.weights < memory.needed_bytes(info, EngineOptions()).weights
    held = held_bytes(load(info, INT8).model)
    assert need.weights == pytest.approx(held, rel=0.2)


@pytest.mark.parametrize("extra", [{"quantize": "int3"}, {"quantize": "int8", "use_gpu": True}])
def test_other_kinds_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="int8"):
        memory.quantization(EngineOptions(extra=tuple(extra.items())))
