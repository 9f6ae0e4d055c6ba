"""Tool calls in every family's writing, at every cut; what is none stays text."""

from __future__ import annotations

import json
import random

import pytest

from serve_app.engines.tools import HERMES, JSON, MISTRAL, Found, family_of, reader_for, takes_tools

NAMES = ["weather", "now"]


def read(family: str, text: str, cuts: list[int], forced: bool = False) -> Found:
    reader = reader_for(family, NAMES, forced)
    whole = Found()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found = reader.feed(text[start:end])
        whole.text += found.text
        whole.calls += found.calls
    found = reader.finish()
    return Found(whole.text + found.text, whole.calls + found.calls)


def summary(found: Found) -> tuple[str, list[tuple[str | None, object]]]:
    assert [call.index for call in found.calls] == list(range(len(found.calls)))
    assert len({call.id for call in found.calls}) == len(found.calls)
    return found.text, [(call.name, json.loads(call.arguments)) for call in found.calls]


ROME = ("weather", {"city": "Rome"})
CASES: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    (HERMES, "Just text <b>.", "Just text <b>.", []),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", [ROME]),
    (HERMES, 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', "Let me see. ",
     [ROME]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "weather", "arguments": {"city": "Rome"}}'
     "</tool_call>", "", [("now", {}), ROME]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>\\""}}</tool_call>', "",
     [("now", {"a": '</tool_call>"'})]),
    (HERMES, '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>!', "!", [("now", {})]),
    (HERMES, "<tool_call>{nonsense}</tool_call> so", "<tool_call>{nonsense}</tool_call> so", []),
    (HERMES, "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    (HERMES, '<tool_call>{"name": "now", "arg', '<tool_call>{"name": "now", "arg', []),
    (HERMES, '<tool_call>{"name": "now", "arguments": {}}', "", [("now", {})]),
    (HERMES, "a <tool_c", "a <tool_c", []),
    (MISTRAL, "Just [TOOL] text", "Just [TOOL] text", []),
    (MISTRAL, 'Hm. [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now"}]', "Hm. ",
     [ROME, ("now", {})]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]now{}', "", [ROME, ("now", {})]),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "argu', '[TOOL_CALLS][{"name": "weather", "argu', []),
    (JSON, "Just text {", "Just text {", []),
    (JSON, '{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
    (JSON, '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "Rome"}}', "",
     [("now", {}), ROME]),
    (JSON, '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    (JSON, '{"city": "Rome"} is JSON', '{"city": "Rome"} is JSON', []),
    (JSON, '{"name": "now", "para', '{"name": "now", "para', []),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}: {case[1][:40]}" for case in CASES])
def test_calls_are_found_at_every_cut(case: tuple[str, str, str, list[tuple[str, object]]]) -> None:
    family, text, expected, calls = case
    for cut in range(len(text) + 1):
        assert summary(read(family, text, [cut])) == (expected, calls)
    assert summary(read(family, text, list(range(1, len(text))))) == (expected, calls)
    for seed in range(20):
        cuts = sorted(random.Random(seed).sample(range(len(text) + 1), min(4, len(text))))
        assert summary(read(family, text, cuts)) == (expected, calls)


def test_a_forced_list_is_told_call_by_call() -> None:
    text = '[ {"name": "now", "arguments": {"a": {"b": "]},["}}} , {"name":"weather","arguments":{"city":"Rome"}}]'
    expected = ("", [("now", {"a": {"b": "]},["}}), ROME])
    for cut in range(len(text) + 1):
        assert summary(read("", text, [cut], forced=True)) == expected
    reader = reader_for("", NAMES, forced=True)
    assert [call.name for call in reader.feed(text[:60]).calls] == ["now"]
    cut_short = summary(read("", text[:70], [], forced=True))
    assert cut_short[1] == expected[1][:1] and cut_short[0]


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = reader_for(HERMES, NAMES, False)
    assert [reader.feed(piece).text for piece in ("Well, ", "a < b", " <tool", "s>")] == [
        "Well, ", "a < b", " ", "<tools>",
    ]  # fmt: skip
    free = reader_for(JSON, NAMES, False)
    assert [free.feed(piece).text for piece in ("  ", "Hi", "{")] == ["", "  Hi", "{"]


def test_a_nesting_bomb_is_text() -> None:
    text = "<tool_call>" + "[" * 200_000 + "</tool_call>"
    assert summary(read(HERMES, text, [])) == (text, [])


def test_mistrals_ids_are_nine_letters_and_digits() -> None:
    (call,) = read(MISTRAL, "[TOOL_CALLS]now{}", []).calls
    assert call.id is not None and len(call.id) == 9 and call.id.isalnum()


def test_families_are_known_by_their_templates() -> None:
    assert family_of("{% if tools %}… <tool_call> …{% endif %}") == HERMES
    assert family_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == MISTRAL
    assert family_of("{%- if tools is not none %}{{ tools }}") == JSON
    assert takes_tools("{%- if tools is not none %}") and takes_tools("{{- tools | tojson }}")
    assert not takes_tools("Use your tools. {% if messages %}")
