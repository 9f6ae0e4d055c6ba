"""What a document may ask for; the judgement itself must be cheap."""

from __future__ import annotations

import time
from typing import Any

import pytest
from graphql import GraphQLError, parse, validate

from serve_app.api.graphql import build_schema
from serve_app.api.graphql.limits import (
    INTROSPECTION_DEPTH,
    MAX_ALIASES,
    MAX_DEPTH,
    MAX_SELECTIONS,
    MAX_TOKENS,
    Measure,
    Size,
)

SCHEMA = build_schema()


def size(query: str) -> Size:
    return Measure(parse(query)).whole()


def nested_fragments(count: int, of: str = "Conversation", body: str = "messages { id }") -> str:
    """Each fragment spreads the next one twice: written out, the last one stands there 2**count times."""
    chain = "".join(f"fragment F{n} on {of} {{ ...F{n + 1} ...F{n + 1} }} " for n in range(count))
    return f"{{ conversation(id: 1) {{ ...F0 }} }} {chain} fragment F{count} on {of} {{ {body} }}"


async def refusals(query: str) -> tuple[list[str], float]:
    began = time.process_time()
    result = await SCHEMA.execute(query)
    return [error.message for error in result.errors or ()], time.process_time() - began


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("{ a }", Size(1, 0, 1)),
        ("{ a { b { c } } d }", Size(3, 0, 4)),
        ("{ x: a y: a { z: b } }", Size(2, 3, 3)),
        ("{ a { ... on T { b } } }", Size(2, 0, 3)),
        ("{ ...F } fragment F on T { x: a { b } }", Size(2, 2, 5)),
        ("{ ...F } fragment F on T { a ...F }", Size(1, 0, 5)),
        ("{ ...Unknown }", Size(0, 0, 1)),
        ("query A { a { b } } query B { c }", Size(2, 0, 3)),
    ],
)
def test_a_document_is_measured_with_its_fragments_written_out(query: str, expected: Size):
    assert size(query) == expected


def test_introspection_may_go_deeper_than_the_rest():
    deep = "{ a " * (INTROSPECTION_DEPTH + 1) + "} " * (INTROSPECTION_DEPTH + 1)
    assert size("{ __schema " + deep + "}").depth == 2
    assert size("{ data " + deep + "}").depth == INTROSPECTION_DEPTH + 2


@pytest.mark.parametrize("count", [9, 13, 40])
async def test_hostile_nested_fragments_are_refused_at_once(count: int):
    """Each further level doubles the work of rules that follow every spread."""
    query = nested_fragments(count)
    assert size(query).selections > 2**count
    messages, seconds = await refusals(query)
    assert any("too many selections" in message for message in messages)
    assert seconds < 0.1


async def test_hostile_nested_aliases_are_refused_at_once():
    fragments = "".join(f"fragment F{n} on Conversation {{ a: id ...F{n + 1} ...F{n + 1} }} " for n in range(25))
    query = f"{{ conversation(id: 1) {{ ...F0 }} }} {fragments} fragment F25 on Conversation {{ b: id }}"
    messages, seconds = await refusals(query)
    assert any("too many aliases" in message for message in messages)
    assert seconds < 0.1


@pytest.mark.parametrize(
    "query",
    [
        "{ " + "id " * (MAX_TOKENS - 2) + "}",
        "{ " + "availableModels { items { name } } " * (MAX_SELECTIONS // 3) + "}",
        "{ " + "conversations { conversations { id } count } " * (MAX_SELECTIONS // 4) + "}",
        "{ " + "...F " * (MAX_SELECTIONS // 4) + "} fragment F on Query { " + "__typename " * 2 + "}",
        "{ "
        + "".join(f"...F{n} " for n in range(70))
        + "}"
        + "".join(f"fragment F{n} on Query {{x}} " for n in range(70)),
        "{ __schema { types { fields { type { fields { type { fields { name } } } } } } } }",
        "query(" + "".join(f"$v{n}: Int " for n in range(200)) + ") { __typename }",
    ],
)
async def test_the_most_expensive_documents_are_judged_within_a_moment(query: str):
    _, seconds = await refusals(query)
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("{ " + "a { " * MAX_DEPTH + "b" + " }" * MAX_DEPTH + " }", "too many levels deep"),
        ("{ " + " ".join(f"a{n}: __typename" for n in range(MAX_ALIASES + 1)) + " }", "too many aliases"),
        ("{ " + "__typename " * (MAX_SELECTIONS + 1) + "}", "too many selections"),
        ("{ " + "__typename " * MAX_TOKENS + "}", "more than 1000 tokens"),
        ("{ a " * 200 + "} " * 200, "too many levels deep"),
        ("{ a(x: " + "[" * 480 + "]" * 480 + ") }", "nested too deeply"),
    ],
)
async def test_a_document_over_a_limit_is_refused_with_the_reason(query: str, why: str):
    messages, _ = await refusals(query)
    assert any(why in message for message in messages), messages


async def test_a_document_at_the_limits_runs():
    aliases = " ".join(f"a{n}: __typename" for n in range(MAX_ALIASES))
    rest = "__typename " * (MAX_SELECTIONS - MAX_ALIASES)
    result = await SCHEMA.execute(f"{{ {aliases} {rest} }}")
    assert result.errors is None


async def test_the_rules_look_at_a_document_once(monkeypatch: pytest.MonkeyPatch):
    looked = []

    def counting(*given: Any) -> list[GraphQLError]:
        looked.append(given)
        return validate(*given)

    monkeypatch.setattr("strawberry.schema.schema.validate", counting)
    for query, refused in (("{ __typename } # seen before", 0), ("{ nothing } # seen before", 1)):
        looked.clear()
        first, second = [await SCHEMA.execute(query) for _ in range(2)]
        assert len(looked) == 1
        assert len(first.errors or ()) == len(second.errors or ()) == refused
        assert first.errors is None or first.errors[0] is not (second.errors or ())[0]
