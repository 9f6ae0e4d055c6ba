"""Replies of a given form: always what was asked for, whatever the model would have said."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import transformers

from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidInput,
    RotundaError,
)
from serve_app.domain.generation import FinishReason, GenerationRequest, Image, JsonFormat, Message, Options
from serve_app.domain.tools import Tool, ToolUse
from serve_app.engines import structured
from serve_app.engines.structured import Grammar, Grammars
from serve_app.engines.transformers import TransformersEngine
from serve_app.engines.vocabulary import Vocabulary
from tests import pictures
from tests.engine import tiny_models

Make = Callable[..., Awaitable[TransformersEngine]]
Ask = Callable[..., Awaitable[Any]]
TINY_CHAT = Path(__file__).parents[2] / "models" / "huggingface" / "rotunda" / "tiny-chat"

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü🙂"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def wanting(schema: Any, text: str = "Hello", **settings: Any) -> GenerationRequest:
    options = Options(response_format=JsonFormat(schema))
    return GenerationRequest("r", "m", (Message.of("user", text),), options, **settings)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Vocabulary(tiny_models.tokenizer(), 300, (2,)))


@pytest.mark.parametrize("options", [{}, *({"temperature": 1.5, "seed": seed} for seed in range(6))])
async def test_a_reply_of_a_schema_fits_it(make_engine: Make, ask: Ask, options: dict[str, Any]) -> None:
    engine = await make_engine("chat")
    reply = await ask(engine, "Hello", max_tokens=200, response_format=JsonFormat(PERSON), **options)
    assert reply.finish.reason is FinishReason.STOP
    jsonschema.validate(json.loads(reply.text), PERSON)


async def test_any_object_is_valid_json_or_cut_for_its_length(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat", max_concurrency=8)
    asked = (
        ask(engine, "Hello", max_tokens=60, temperature=1.0, seed=seed, response_format=JsonFormat())
        for seed in range(12)
    )
    for reply in await asyncio.gather(*asked):
        if reply.finish.reason is FinishReason.STOP:
            assert isinstance(json.loads(reply.text), dict)
        else:
            assert reply.finish.reason is FinishReason.LENGTH and reply.text.lstrip().startswith("{")


async def test_a_model_without_an_end_token_ends_all_the_same(tmp_path: Path, make_engine: Make, ask: Ask) -> None:
    path = tiny_models.save_causal(tmp_path / "m", eos_token_id=None)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    engine = await make_engine(path)
    reply = await ask(engine, "Hello", max_tokens=50, response_format=JsonFormat({"enum": ["yes", "no"]}))
    assert json.loads(reply.text) in ("yes", "no")
    assert reply.finish.reason is FinishReason.STOP
    number = await ask(engine, "Hello", max_tokens=9, temperature=1.0, response_format=JsonFormat({"type": "integer"}))
    int(number.text)  # a number may always go on: without an end token it ends with its length, or where it cannot


async def test_a_checkpoints_own_settings_cannot_break_the_form(tmp_path: Path, make_engine: Make, ask: Ask) -> None:
    settings = {"suppress_tokens": list(range(8, 300)), "min_new_tokens": 40, "forced_bos_token_id": 7}
    engine = await make_engine(tiny_models.save_causal(tmp_path / "m", **settings))
    reply = await ask(engine, "Hello", max_tokens=200, response_format=JsonFormat({"const": {"a": [1, True]}}))
    assert json.loads(reply.text) == {"a": [1, True]}


async def test_a_begun_reply_is_continued_in_its_form(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat")
    begun = Message.of("assistant", '{"name": "Ada", "ag')
    reply = await ask(engine, "Hello", begun, go_on=True, max_tokens=100, response_format=JsonFormat(PERSON))
    assert json.loads(begun.text + reply.text)["name"] == "Ada"
    with pytest.raises(InvalidInput, match="continue"):
        await ask(engine, "Hello", Message.of("assistant", "Well, "), go_on=True, response_format=JsonFormat(PERSON))


async def test_it_works_with_log_probabilities_and_penalties(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat")
    options = {"frequency_penalty": 2.0, "repetition_penalty": 1.5, "logprobs": 2, "logit_bias": {9: 50.0}}
    reply = await ask(engine, "Hello", max_tokens=200, response_format=JsonFormat(PERSON), **options)
    jsonschema.validate(json.loads(reply.text), PERSON)


def test_every_kind_of_tokenizer_spells_its_tokens(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "▁", "▁{", "}", '"', "a", ":", "▁1", *(f"<0x{byte:02X}>" for byte in range(256))]
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    vocabulary = Vocabulary(tokenizer, len(words), (1,))
    assert [vocabulary.spell(token) for token in (3, 5, 9 + 0xC3)] == [b" {", b'"', b"\xc3"]
    assert Grammars(vocabulary).of(wanting({"const": {"a": 1}})) is not None


@pytest.mark.skipif(not (TINY_CHAT / "tokenizer.json").exists(), reason="the shipped model is not here")
def test_the_shipped_models_tokenizer_serves() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_CHAT)
    grammar = Grammars(Vocabulary(tokenizer, len(tokenizer), (2, 1))).of(wanting(PERSON))
    assert grammar is not None
    for token in tokenizer('{"name": "Ada", "age": 36, "tags": ["ü🙂"]}')["input_ids"]:
        assert grammar.allows(token) and bool(grammar.allowed(len(tokenizer))[token])
        grammar.accept(token)
    assert grammar.complete


@pytest.mark.skipif(not (TINY_CHAT / "model.safetensors").exists(), reason="the shipped model is not here")
async def test_the_shipped_model_is_not_lost_in_blanks(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine(TINY_CHAT)
    reply = await ask(engine, "What is 2 + 3?", max_tokens=200, response_format=JsonFormat(PERSON))
    jsonschema.validate(json.loads(reply.text), PERSON)


def bomb(depth: int) -> dict[str, Any]:
    if depth == 0:
        return {"type": "string"}
    below = bomb(depth - 1)
    return {"anyOf": [{"type": "object", "properties": {"a": below, "b": below}}, {"type": "array", "items": below}]}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD: dict[str, tuple[Any, str]] = {
    "contradicts itself": ({"type": "integer", "minimum": 5, "maximum": 3}, "contradicts"),
    "false": (False, "contradicts"),
    "impossible part": ({"type": "object", "required": ["a"], "properties": {"a": False}}, "contradicts"),
    "not supported": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not supported in spite of asking": ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "not"),
    "not a schema": ({"type": "nonsense"}, "cannot be used"),
    "elsewhere": ({"$ref": "http://127.0.0.1:9/schema.json"}, "cannot be used"),
    "endless": ({"$ref": "#"}, "contradicts|cannot be used"),
    "broken pattern": ({"type": "string", "pattern": "("}, "cannot be used"),
    "too deep": (nested(70), "too large"),
    "too long": ({"enum": ["x" * 1000 + str(n) for n in range(100)]}, "too large"),
    "a bomb": (bomb(12), "too large"),
    "a list": ([1], "object"),
    "no JSON": ({"const": float("nan")}, "no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_schema_is_refused_fast_and_in_our_words(grammars: Grammars, name: str) -> None:
    schema, words = BAD[name]
    for _ in range(2):  # the second time from memory
        begun = time.monotonic()
        with pytest.raises(InvalidInput, match=words) as refused:
            grammars.of(wanting(schema))
        assert time.monotonic() - begun < 1.0
        assert "127.0.0.1" not in refused.value.message and refused.value.details["param"] == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {}}}
        | {"$ref": "#/$defs/d0"},
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"type": "string", "pattern": "(.*a){20}.{500}"},
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}},
        {"anyOf": [{"type": "string", "pattern": f"a*{n}b*"} for n in range(500)]},
        {"type": "array", "minItems": 100_000, "items": {"type": "integer"}},
    ],
    ids=["references", "powers", "backtracking", "many", "alternatives", "long"],
)
def test_a_costly_schema_is_refused_or_its_steps_are_quick(grammars: Grammars, schema: dict[str, Any]) -> None:
    begun = time.monotonic()
    try:
        grammar = grammars.of(wanting(schema))
    except InvalidInput:
        grammar = None
    assert time.monotonic() - begun < 3.0
    if grammar is not None:
        with suppress(GenerationFailed):
            walk(grammar, steps=20)


def walk(grammar: Grammar, steps: int) -> None:
    for _ in range(steps):
        begun = time.monotonic()
        allowed = grammar.allowed(300).nonzero().flatten().tolist()
        grammar.accept(allowed[len(allowed) // 2])
        assert time.monotonic() - begun < 0.25
        if grammar.complete:
            return


def test_compiled_schemas_are_kept_and_forgotten(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "KEPT", 2)
    compiled: list[str] = []
    original = Grammars._compile

    def compile(self: Grammars, schema: str) -> Any:
        compiled.append(schema)
        return original(self, schema)

    monkeypatch.setattr(Grammars, "_compile", compile)
    for value in (1001, 1001, 1002, 1003, 1001):
        grammars.of(wanting({"const": value}))
    assert [json.loads(schema)["const"] for schema in compiled] == [1001, 1002, 1003, 1001]


def test_two_replies_of_one_schema_do_not_disturb_each_other(grammars: Grammars) -> None:
    first, second = grammars.of(wanting({"enum": [1, 22]})), grammars.of(wanting({"enum": [1, 22]}))
    assert first is not None and second is not None
    (one,) = tiny_models.tokenizer()("1")["input_ids"]
    first.accept(one)
    assert first.complete and not second.complete and second.allows(one)


def test_the_references_of_a_tools_parameters_still_lead_somewhere(grammars: Grammars) -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "$defs": {"Place": {"type": "object", "properties": {"x": {"const": 7}}, "required": ["x"]}},
    }
    tools = (Tool("go", parameters=parameters), Tool("stay"))
    request = GenerationRequest("r", "m", (Message.of("user", "x"),), tools=ToolUse(tools, choice="required"))
    grammar = grammars.of(request)
    assert grammar is not None
    for token in tiny_models.tokenizer()('[{"name":"go","arguments":{"at":{"x":7}}}]')["input_ids"]:
        grammar.accept(token)


class Crowd:
    """Seven clients of an engine that ask the same again and again while somebody misbehaves beside them."""

    def __init__(self, engine: TransformersEngine, ask: Ask, size: int = 7) -> None:
        self._engine, self._ask, self._size = engine, ask, size
        self._over = asyncio.Event()
        self.replies = 0

    async def _client(self) -> set[str]:
        texts = set()
        while not self._over.is_set():
            texts.add((await self._ask(self._engine, "Hello", max_tokens=80)).text)
            self.replies += 1
        return texts

    async def __aenter__(self) -> Crowd:
        self._alone = (await self._ask(self._engine, "Hello", max_tokens=80)).text
        self._clients = [asyncio.create_task(self._client()) for _ in range(self._size)]
        while self._engine.counters().running < self._size:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        assert set.union(*await asyncio.gather(*self._clients)) == {self._alone}


async def test_bad_requests_do_not_disturb_seven_others(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("chat", max_concurrency=8)
    async with Crowd(engine, ask) as crowd:
        for schema, _ in BAD.values():
            with pytest.raises(InvalidInput):
                await ask(engine, "Hello", response_format=JsonFormat(schema))
        for bad in (
            {"stop": tuple(f"x{n}" for n in range(10_000))},
            {"stop": (7,)},
            {"temperature": 3.0},
            {"top_p": 0.0},
            {"logprobs": 21},
            {"logit_bias": dict.fromkeys(range(100000), 1.0)},
            {"presence_penalty": float("nan")},
            {"stop": ("x",), "response_format": JsonFormat()},
        ):
            with pytest.raises(InvalidInput):
                await ask(engine, "Hello", **bad)
        with pytest.raises(InvalidInput, match="empty"):
            await ask(engine, " ")
        with pytest.raises(ContextLengthExceeded):
            await ask(engine, "word " * 2000)
        with pytest.raises(CapabilityMissing):
            await ask(engine, Message.of("user", "x", (Image("image/png", pictures.bomb()),)))
    now = engine.counters()
    assert (now.running, now.waiting, now.finished) == (0, 0, 1 + crowd.replies)
    assert now.requests == now.finished + now.failed and now.failed > len(BAD)


async def test_an_image_bomb_is_refused_before_it_is_opened_while_seven_stream(make_engine: Make, ask: Ask) -> None:
    engine = await make_engine("vision", max_concurrency=8)
    async with Crowd(engine, ask):
        for _ in range(3):
            with pytest.raises(RotundaError) as refused:
                await ask(engine, Message.of("user", "x", (Image("image/png", pictures.bomb()),)))
            assert refused.value.code in ("UNSUPPORTED_MEDIA", "PAYLOAD_TOO_LARGE") and not refused.value.retryable
    engine.check_health()
