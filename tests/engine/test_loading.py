"""Loading: what is refused, what is converted, and that nothing of a model's own is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from serve_app.domain.errors import InvalidConfig, ModelLoadFailed, ModelUnsafe, RotundaError
from serve_app.engines import memory
from serve_app.engines import transformers as transformers_engine
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import discover, inspect
from serve_app.engines.loading import load, set_threads
from serve_app.engines.transformers import TransformersEngine, create
from tests.engine import tiny_models

Make = Callable[..., Awaitable[TransformersEngine]]


@pytest.fixture
def model(store: Path, tmp_path: Path) -> Path:
    """A model of one's own to spoil."""
    return Path(shutil.copytree(store / "chat", tmp_path / "store/org/name"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def failing(model: Path, **settings: Any) -> RotundaError:
    with pytest.raises(RotundaError) as refused:
        load(inspect(model, "org/name"), EngineOptions(**settings))
    assert str(model) not in refused.value.message
    return refused.value


def test_progress_is_told(model: Path) -> None:
    seen: list[tuple[str, float]] = []
    create(inspect(model, "org/name"), EngineOptions(), lambda phase, done: seen.append((phase, done)))
    assert seen == [(phase, done) for phase in ("import", "weights", "warmup") for done in (0.0, 1.0)]


def test_missing_tensors_are_refused_for_good(model: Path) -> None:
    tensors = weights_of(model)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = failing(model)
    assert isinstance(error, ModelLoadFailed) and not error.retryable and "lack 1 tensors" in error.message


def test_tied_weights_are_not_missing(model: Path) -> None:
    assert "lm_head.weight" not in weights_of(model)
    load(inspect(model, "org/name"), EngineOptions())


def test_wrong_shapes_are_refused_for_good(model: Path) -> None:
    edit(model / "config.json", intermediate_size=48)
    error = failing(model)
    assert isinstance(error, ModelLoadFailed) and not error.retryable and "shapes" in error.message


def test_an_unknown_architecture_is_refused_for_good(model: Path) -> None:
    edit(model / "config.json", model_type="nosuchmodel")
    assert isinstance(failing(model), ModelLoadFailed)


def test_a_broken_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert isinstance(failing(model), ModelLoadFailed)


def test_files_are_looked_at_again_before_loading(model: Path) -> None:
    info = inspect(model, "org/name")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelUnsafe):
        load(info, EngineOptions())


def test_files_that_changed_since_are_tried_again_later(model: Path) -> None:
    info = inspect(model, "org/name")
    edit(model / "config.json", note="hello")
    with pytest.raises(ModelLoadFailed) as refused:
        load(info, EngineOptions())
    assert refused.value.retryable


def test_a_model_found_in_a_store_with_links_loads(model: Path) -> None:
    other = model.parent / "other"
    shutil.copytree(model, other)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").symlink_to(model / "tokenizer.json")
    for info in discover(model.parent.parent):
        assert load(info, EngineOptions()).info.id == info.id


@pytest.mark.parametrize("rounds", [40, 400], ids=["slow", "slower"])
def test_a_template_that_takes_too_long_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    monkeypatch.setattr(transformers_engine, "TEMPLATE_WAIT_S", 0.5)
    template = f"{{% for n in range({rounds}) %}}{{% for m in range(99999) %}}{{% endfor %}}{{% endfor %}}Hello"
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelUnsafe, match="more than 100 ms"):
        create(inspect(model, "org/name"), EngineOptions())


def test_code_beside_the_weights_is_never_run(model: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (model / "modeling_llama.py").write_text(f"open({str(witness)!r}, 'w')")
    load(inspect(model, "org/name"), EngineOptions())
    assert not witness.exists()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hardware", [True, False])
def test_half_precision_becomes_float32_where_it_is_emulated(
    model: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, hardware: bool
) -> None:
    monkeypatch.setattr(memory, "cpu_has_bfloat16", lambda: hardware)
    save_file(
        {name: t.to(stored) for name, t in weights_of(model).items()}, model / "model.safetensors", {"format": "pt"}
    )
    edit(model / "config.json", dtype=str(stored).removeprefix("torch."))
    info = inspect(model, "org/name")
    loaded = load(info, EngineOptions())
    kept = hardware and stored is torch.bfloat16
    assert loaded.model.dtype is (stored if kept else torch.float32)
    held = sum(tensor.numel() * tensor.element_size() for tensor in loaded.model.parameters())
    assert memory.needed_bytes(info, EngineOptions()).weights == held


def test_the_kv_cache_is_as_large_as_was_computed(model: Path) -> None:
    info = inspect(model, "org/name")
    loaded = load(info, EngineOptions())
    out = loaded.model(torch.arange(64)[None], use_cache=True)
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in out.past_key_values.layers)
    options = EngineOptions(context_length=64, max_concurrency=1)
    assert memory.needed_bytes(info, options).kv_cache == held


def test_a_context_that_only_the_class_knows_is_filled_in(store: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(store / "vision", tmp_path / "vision"))
    config = json.loads((model / "config.json").read_text())
    config["text_config"].pop("max_position_embeddings")
    (model / "config.json").write_text(json.dumps(config))
    info = inspect(model, "vision")
    assert info.context_length is None
    assert load(info, EngineOptions()).info.context_length == 2048


def test_threads_can_be_set_again_and_again() -> None:
    for threads in (1, 2, 1):
        set_threads(torch, threads)
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == (1, 1)


def test_sdpa_falls_back_to_eager(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert load(inspect(model, "org/name"), EngineOptions()).attention == "eager"


def test_an_unknown_setting_is_refused(model: Path) -> None:
    with pytest.raises(InvalidConfig, match="nope"):
        create(inspect(model, "org/name"), EngineOptions(extra=(("nope", 1),)))


@pytest.mark.parametrize("wrong", [0, 15, -512, 64.5, "many", True])
def test_batch_tokens_are_a_whole_number_of_some_size(model: Path, wrong: str | float) -> None:
    with pytest.raises(InvalidConfig, match="batch_tokens is a whole number from 16 on"):
        create(inspect(model, "org/name"), EngineOptions(extra=(("batch_tokens", wrong),)))


def test_a_wrong_cache_is_noticed_and_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.engines import decoding

    original = decoding.Passes._forward

    def forgetful(self: decoding.Passes, tokens: torch.Tensor, arguments: Any, first: bool) -> Any:
        if self.cached and not first:
            arguments = {"use_cache": True, "attention_mask": arguments["attention_mask"][:, -1:]}
        return original(self, tokens, arguments, first)

    monkeypatch.setattr(decoding.Passes, "_forward", forgetful)
    engine = create(inspect(model, "org/name"), EngineOptions())
    assert "no cache" in engine.description


async def test_without_a_cache_the_tokens_are_the_same(
    make_engine: Make, ask: Callable[..., Awaitable[Any]], tmp_path: Path
) -> None:
    bloom = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", bloom))
    cached = await ask(engine, "Hello")
    engine._worker._decoder._passes.cached = False  # type: ignore[attr-defined]
    assert (await ask(engine, "Hello")).ids == cached.ids
