"""Which turns of a conversation are left out, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.domain.errors import ContextLengthExceeded
from serve_app.domain.generation import ContextPolicy, Message
from serve_app.engines.context import Fitted, Messages, fit, split_turns


def words(messages: Messages) -> int:
    return sum(len(message.text.split()) for message in messages)


def run(
    messages: Messages, limit: int | None, max_tokens: int = 4, policy: ContextPolicy = "truncate"
) -> Fitted[Messages]:
    return fit(messages, lambda kept: kept, words, limit, max_tokens, policy)


def talk(*lengths: int, system: int = 0) -> Messages:
    """User and assistant in turns, each message with so many words; ends with the user's if the count is odd."""
    roles = ("user", "assistant")
    turns = [Message.of(roles[n % 2], f"m{n} " * length) for n, length in enumerate(lengths)]
    return (*([Message.of("system", "s " * system)] if system else []), *turns)


def test_what_fits_stays_whole() -> None:
    assert run(talk(3, 3, 3), limit=13) == Fitted(talk(3, 3, 3), 0, 4)


def test_the_oldest_turn_goes_with_its_reply() -> None:
    fitted = run(talk(3, 3, 3, 3, 3, system=2), limit=17)
    assert fitted.dropped == 1
    assert [message.text.split()[0] for message in fitted.prompt] == ["s", "m2", "m3", "m4"]


def test_no_more_goes_than_must() -> None:
    for limit in range(8, 40):
        fitted = run(talk(*[3] * 9), limit=limit)
        kept = words(fitted.prompt)
        assert kept + fitted.max_tokens <= limit
        assert fitted.dropped == 0 or kept + 6 + min(4, limit // 4) > limit


def test_the_new_message_and_the_system_prompt_never_go() -> None:
    fitted = run(talk(9, 9, 5, system=4), limit=10)
    assert [message.text.split()[0] for message in fitted.prompt] == ["s", "m2"]
    assert fitted.max_tokens == 1
    with pytest.raises(ContextLengthExceeded) as refused:
        run(talk(9, 9, 5, system=4), limit=9)
    assert refused.value.details == {"promptTokens": 9, "contextLength": 9, "maxTokens": 4}


def test_error_means_error_but_clips_the_reply() -> None:
    assert run(talk(3, 3, 3), limit=10, policy="error").max_tokens == 1
    with pytest.raises(ContextLengthExceeded):
        run(talk(3, 3, 3), limit=9, policy="error")


def test_a_model_without_a_limit_takes_everything() -> None:
    assert run(talk(*[100] * 99), limit=None, max_tokens=7).max_tokens == 7


def test_a_continued_reply_keeps_its_question() -> None:
    system, old, newest = split_turns(talk(1, 1, 1, 1, system=1))
    assert [len(part) for part in (system, old, newest)] == [1, 1, 2]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 80), st.integers(1, 30))
def test_it_fits_or_says_so_and_asks_few_times(lengths: list[int], limit: int, max_tokens: int) -> None:
    renders = 0

    def render(messages: Messages) -> Messages:
        nonlocal renders
        renders += 1
        return messages

    messages = talk(*lengths)
    try:
        fitted = fit(messages, render, words, limit, max_tokens, "truncate")
    except ContextLengthExceeded as refused:
        assert refused.details["promptTokens"] + 1 > limit
    else:
        assert words(fitted.prompt) + fitted.max_tokens <= limit and 1 <= fitted.max_tokens <= max_tokens
        assert fitted.prompt[-1] == messages[-1]
    assert renders <= 7
