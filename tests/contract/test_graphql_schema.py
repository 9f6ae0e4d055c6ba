"""The served schema: it keeps what clients use, and it is the one that is committed."""

from __future__ import annotations

from pathlib import Path

from graphql import (
    BreakingChangeType,
    build_schema,
    find_breaking_changes,
    get_introspection_query,
    is_abstract_type,
    parse,
)

from serve_app.api.graphql import build_schema as served_schema
from serve_app.api.graphql.limits import Measure
from serve_app.api.graphql.schema import PRINTED

KEPT = Path(__file__).with_name("kept.graphql")


def test_the_kept_operations_are_served_unchanged():
    kept = build_schema(KEPT.read_text("utf-8"))
    served = build_schema(served_schema().as_str())
    assert find_breaking_changes(kept, served) == []


def test_a_missing_field_would_be_noticed():
    kept = build_schema(KEPT.read_text("utf-8"))
    served = build_schema(served_schema().as_str().replace("llmResponseTime: Float", "seconds: Float"))
    assert [change.type for change in find_breaking_changes(kept, served)] == [BreakingChangeType.FIELD_REMOVED]


def test_the_committed_schema_is_the_served_one():
    assert served_schema().as_str() + "\n" == PRINTED.read_text("utf-8"), (
        "write it again with: python -m serve_app.api.graphql"
    )


def test_what_was_added_to_the_kept_operations_is_optional():
    served = build_schema(served_schema().as_str())
    mutation = served.mutation_type
    assert mutation is not None
    for name in ("deleteConversation", "deleteMessagesAfter"):
        assert {"password", "token"} < mutation.fields[name].args.keys()
    assert mutation.fields["warmupOllama"].deprecation_reason
    for name in ("CreateConversationInput", "AddMessageInput"):
        assert "systemPrompt" in served.type_map[name].fields
    assert "accessToken" in served.type_map["VerifyPasswordResponse"].fields
    assert {"status", "model", "provider"} < served.type_map["Message"].fields.keys()


def test_full_introspection_is_within_the_limits():
    for depth in (7, 9):
        assert Measure(parse(get_introspection_query(type_depth=depth))).whole().problems() == []


def test_what_comes_together_can_be_asked_together():
    """Types of one union or interface agree on the types of the fields that they share."""
    schema = build_schema(served_schema().as_str())
    for name, abstract in schema.type_map.items():
        if not is_abstract_type(abstract) or name.startswith("__"):
            continue
        seen: dict[str, str] = {}
        for possible in schema.get_possible_types(abstract):
            for field_name, field in possible.fields.items():
                assert seen.setdefault(field_name, str(field.type)) == str(field.type), (name, field_name)
