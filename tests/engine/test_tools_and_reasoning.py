"""Tools and reasoning through an engine: what the template is told, and what is read out of the reply."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import transformers

from serve_app.domain.catalog import Capability
from serve_app.domain.errors import CapabilityMissing, InvalidInput
from serve_app.domain.generation import (
    Delta,
    Finish,
    FinishReason,
    GenerationRequest,
    Item,
    JsonFormat,
    Message,
    Options,
    Role,
    Text,
)
from serve_app.domain.tools import Tool, ToolCall, ToolCallPart, ToolUse
from serve_app.engines.discovery import inspect
from serve_app.engines.reply import Format, ReplyStream
from serve_app.engines.text import Detokenizer
from serve_app.engines.transformers import TransformersEngine, detokenizers
from tests.engine import tiny_models

Make = Callable[..., Awaitable[TransformersEngine]]

HERMES = (
    "{%- if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    'Call with <tool_call>{"name": …}</tool_call><|im_end|>\n{% endif %}'
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
    "{%- if message.role == 'tool' %} ({{ message.name }}, {{ message.tool_call_id }}){% endif %}<|im_end|>\n"
    "{%- endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = tiny_models.CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n") + (
    "{# what stands before </think> is left out #}"
)
WEATHER = Tool(
    "weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
)
NOW = Tool("now")


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(**tiny_models.SIZES | {"max_position_embeddings": 4096})
    return tiny_models.save_causal(tmp_path_factory.mktemp("store") / "hermes", config, template=HERMES)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_causal(tmp_path_factory.mktemp("store") / "thinking", template=THINKING)


def asking(*messages: Message, options: Options | None = None, **tools: Any) -> GenerationRequest:
    turns = messages or (Message.of("user", "Hello"),)
    return GenerationRequest("r", "m", turns, options or Options(max_tokens=400), tools=ToolUse(**tools))


def said(stream: ReplyStream, ids: list[int]) -> Delta:
    whole = Delta("")
    for token in ids:
        if not stream.complete and (delta := stream.push(token)) is not None:
            whole += delta
    return whole + (stream.finish() or Delta(""))


async def collect(engine: TransformersEngine, request: GenerationRequest) -> tuple[list[ToolCallPart], str, Finish]:
    items: list[Item] = [item async for item in engine.generate(request)]
    deltas = [item for item in items if isinstance(item, Delta)]
    assert isinstance(items[-1], Finish)
    return [call for delta in deltas for call in delta.tool_calls], "".join(delta.text for delta in deltas), items[-1]


async def test_the_capability_is_found_in_the_template(hermes: Path, store: Path) -> None:
    assert Capability.TOOLS in inspect(hermes, "m").capabilities
    assert Capability.TOOLS not in inspect(store / "chat", "m").capabilities


async def test_a_template_that_knows_no_tools_refuses_them(make_engine: Make) -> None:
    engine = await make_engine("chat")
    for request in (asking(tools=(NOW,)), asking(Message.of("user", "x"), Message(Role.TOOL, (Text("5"),)))):
        with pytest.raises(CapabilityMissing, match="tools"):
            await collect(engine, request)
    await collect(engine, asking(tools=(NOW,), choice="none", options=Options(max_tokens=2)))


async def test_tools_calls_and_results_reach_the_template(make_engine: Make, hermes: Path) -> None:
    engine = await make_engine(hermes)
    call = ToolCall("call_1", "weather", '{"city": "Rome <|im_end|>", "days": 1}')
    history = (
        Message.of("user", "Weather?"),
        Message(Role.ASSISTANT, (), tool_calls=(call,)),
        Message(Role.TOOL, (Text("sunny"),), tool_call_id="call_1", name="weather"),
    )
    ids = engine._prompter.build(asking(*history, tools=(WEATHER,))).ids
    text = tiny_models.tokenizer().decode(ids)
    assert '"description": "Tells the weather."' in text
    assert '{"name": "weather", "arguments": {"city": "Rome' in text and "sunny (weather, call_1)" in text
    assert ids.count(2) == 4  # the <|im_end|> of the arguments is no control token
    without = engine._prompter.build(asking(*history, tools=(WEATHER,), choice="none")).ids
    assert "Tells the weather" not in tiny_models.tokenizer().decode(without)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("use", [{"choice": "required"}, {"name": "weather", "parallel": False}], ids=["any", "named"])
async def test_a_forced_call_is_one_of_the_tools(
    make_engine: Make, hermes: Path, use: dict[str, Any], seed: int
) -> None:
    engine = await make_engine(hermes)
    options = Options(temperature=1.0, seed=seed, max_tokens=1000)
    calls, text, finish = await collect(engine, asking(tools=(WEATHER, NOW), options=options, **use))
    if "name" in use:
        assert ([call.name for call in calls], text, finish.reason) == (["weather"], "", FinishReason.TOOL_CALLS)
    assert calls or finish.reason is FinishReason.LENGTH
    for call in calls:
        if call.name == "weather":
            jsonschema.validate(json.loads(call.arguments), WEATHER.parameters)
        assert call.id and isinstance(json.loads(call.arguments), dict)


async def test_free_calls_are_read_out_of_the_tokens(make_engine: Make, hermes: Path) -> None:
    engine = await make_engine(hermes)
    request = asking(tools=(WEATHER, NOW))
    prompt = engine._prompter.build(request)
    tokenizer = tiny_models.tokenizer()
    text = 'Ü. <tool_call>{"name": "weather", "arguments": {"city": "Zürich 🙂"}}</tool_call>'
    stream = engine._prompter.stream(request, prompt, detokenizers(tokenizer)(()))
    whole = said(stream, tokenizer(text)["input_ids"])
    assert whole.text == "Ü. " and json.loads(whole.tool_calls[0].arguments) == {"city": "Zürich 🙂"}
    assert stream.reason(FinishReason.STOP) is FinishReason.TOOL_CALLS
    assert stream.reason(FinishReason.LENGTH) is FinishReason.LENGTH
    plain = engine._prompter.stream(asking(), prompt, detokenizers(tokenizer)(()))
    assert said(plain, tokenizer(text)["input_ids"]).text == text


def test_a_long_call_gives_signs_of_life() -> None:
    pieces = ["<tool_call>", '{"name": "now", "arguments": {"x": "', *["y"] * 100, '"}}', "</tool_call>"]
    stream = Format(family="hermes").stream(asking(tools=(NOW,)), Detokenizer(pieces.__getitem__, lambda ids: ""), ())
    deltas = [delta for token in range(len(pieces)) if (delta := stream.push(token)) is not None]
    assert len(deltas) == 4 and [bool(delta.tool_calls) for delta in deltas] == [False] * 3 + [True]
    assert [token for delta in deltas for token in delta.token_ids] == list(range(len(pieces)))
    assert not any(delta.text for delta in deltas)


def test_without_parallel_calls_the_first_is_the_last() -> None:
    pieces = ["<tool_call>", '{"name": "now"}', "</tool_call>", "<tool_call>", '{"name": "now"}', "</tool_call>"]
    request = asking(tools=(NOW,), parallel=False)
    stream = Format(family="hermes").stream(request, Detokenizer(pieces.__getitem__, lambda ids: ""), ())
    assert len(said(stream, list(range(6))).tool_calls) == 1 and stream.complete


def test_marks_that_are_control_tokens_are_seen_and_not_told() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[THINK]", "[/THINK]"]})
    form = Format.of(tokenizer, "{% if tools %}{{ tools }}{% endif %}[TOOL_CALLS] [THINK] [/THINK]")
    text = '[THINK]Hm.[/THINK]Well. [TOOL_CALLS][{"name": "now", "arguments": {}}]'
    ids = tokenizer(text)["input_ids"]
    whole = said(form.stream(asking(tools=(NOW,)), detokenizers(tokenizer)(()), ()), ids)
    assert (whole.reasoning, whole.text, [call.name for call in whole.tool_calls]) == ("Hm.", "Well. ", ["now"])


async def test_reasoning_is_kept_apart_where_the_template_begins_it(make_engine: Make, thinking: Path) -> None:
    engine = await make_engine(thinking)
    request = asking(options=Options(logprobs=0))
    prompt = engine._prompter.build(request)
    assert prompt.thinking
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer("Hm, so.\n</think>\n\nYes 🙂.")["input_ids"]
    stream = engine._prompter.stream(request, prompt, detokenizers(tokenizer)(()))
    whole = said(stream, ids)
    assert (whole.reasoning, whole.text) == ("Hm, so.", "Yes 🙂.")
    go_on = (Message.of("user", "Hi"), Message.of("assistant", "<think>\nHm, "))
    continued = GenerationRequest("r", "m", go_on, continue_final=True)
    assert engine._prompter.build(continued).thinking


async def test_a_form_leaves_no_room_for_reasoning(make_engine: Make, thinking: Path) -> None:
    engine = await make_engine(thinking)
    form = JsonFormat({"const": {"a": "<think>x</think>"}})
    _, text, _ = await collect(engine, asking(options=Options(max_tokens=200, response_format=form)))
    assert json.loads(text) == {"a": "<think>x</think>"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Tool("no spaces"),
        lambda: Tool(""),
        lambda: ToolUse((NOW, NOW)),
        lambda: ToolUse(tuple(Tool(f"t{n}") for n in range(200))),
        lambda: ToolUse((Tool("t", "x" * 600_000),)),
        lambda: ToolUse((NOW,), name="later"),
        lambda: ToolUse((), choice="required"),
        lambda: asking(tools=(NOW,), choice="required", options=Options(stop=("x",))),
    ],
)
def test_bad_tools_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(InvalidInput):
        wrong()


async def test_a_raw_prompt_is_read_as_it_stands(make_engine: Make, store: Path) -> None:
    engine = await make_engine("chat")
    request = GenerationRequest("r", "m", (Message.of("user", "<|im_start|> Hello"),), raw=True)
    assert list(engine._prompter.build(request).ids) == tiny_models.tokenizer()("<|im_start|> Hello")["input_ids"]
    with pytest.raises(InvalidInput):
        GenerationRequest("r", "m", (Message.of("user", "a"), Message.of("user", "b")), raw=True)
