"""What is wrong with a request, in words for the one who sent it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.body import StreamMessage
from serve_app.api.validation import parse_json, read
from serve_app.domain.errors import InvalidInput, MalformedRequest


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "message is missing."),
        ({"message": 1, "extra": 2}, "message must be text; extra is not a field of this request."),
        ({"message": "x", "options": {"stop": 5}}, "options.stop must be text or must be a list."),
        ({"message": "x", "options": {"stop": ["a", 5]}}, "options.stop must be text; options.stop[1] must be text."),
        ({"message": "x", "fallbackModels": [1]}, "fallbackModels[0] must be text."),
    ],
)
def test_every_problem_is_named_by_the_senders_own_names(value: object, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(StreamMessage, value)
    assert caught.value.message == words


def test_a_list_of_problems_has_an_end() -> None:
    with pytest.raises(InvalidInput, match="and 16 more"):
        read(StreamMessage, {f"field{n}": n for n in range(20)})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_any_value_is_read_or_refused(value: object) -> None:
    try:
        read(StreamMessage, value)
    except InvalidInput as error:
        assert error.message.endswith(".")


@given(st.binary() | st.text())
def test_any_bytes_are_json_or_malformed(data: bytes | str) -> None:
    try:
        parse_json(data)
    except MalformedRequest as error:
        assert error.status == 400
