"""Which turns of a conversation fit the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.domain.errors import ContextLengthExceeded
from serve_app.domain.generation import ContextPolicy, Message, Role

RESERVE = 256
"""Tokens that truncation leaves free for the reply, if as many are asked for and the context is at least four times
that; a quarter of a smaller context. A prompt that cannot be shortened needs room for one token only."""

P = TypeVar("P")
Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Fitted(Generic[P]):
    """The rendered prompt, the turns left out of it, and the most tokens that the reply may have."""

    prompt: P
    dropped: int
    max_tokens: int


def split_turns(messages: Messages) -> tuple[Messages, tuple[Messages, ...], Messages]:
    """The system messages, the turns that may go (each from a user message to the next) and the newest turn.

    The newest turn is the last message; a reply that is to be continued takes the question before it along.
    """
    system = tuple(message for message in messages if message.role is Role.SYSTEM)
    rest = [message for message in messages if message.role is not Role.SYSTEM]
    turns: list[list[Message]] = []
    for message in rest:
        if message.role is Role.USER or not turns:
            turns.append([])
        turns[-1].append(message)
    if not turns:
        return system, (), ()
    *old, newest = (tuple(turn) for turn in turns)
    return system, tuple(old), newest


def fit(
    messages: Messages,
    render: Callable[[Messages], P],
    length: Callable[[P], int],
    limit: int | None,
    max_tokens: int,
    policy: ContextPolicy,
) -> Fitted[P]:
    """Render as many of the newest turns as fit.

    Args:
        render: makes a prompt of messages; called O(log turns) times.
        length: tokens of a prompt.
        limit: tokens that prompt and reply may have together; None for no limit.
        max_tokens: that are asked for; the answer's are clipped to the room that is left.

    Raises:
        ContextLengthExceeded: with ``promptTokens``, ``contextLength`` and ``maxTokens`` in its details.
    """
    whole = render(messages)
    if limit is None:
        return Fitted(whole, 0, max_tokens)
    reserve = min(max_tokens, RESERVE, max(1, limit // 4))
    if length(whole) + (reserve if policy == "truncate" else 1) <= limit:
        return Fitted(whole, 0, min(max_tokens, limit - length(whole)))
    system, old, newest = split_turns(messages)
    if policy == "error" or not old:
        return _last_chance(whole, 0, length(whole), limit, max_tokens)
    return _truncate(system, old, newest, render, length, limit, max_tokens, reserve)


def _truncate(
    system: Messages,
    old: Sequence[Messages],
    newest: Messages,
    render: Callable[[Messages], P],
    length: Callable[[P], int],
    limit: int,
    max_tokens: int,
    reserve: int,
) -> Fitted[P]:
    """Find by bisection the fewest turns to drop."""
    low, high = 1, len(old)
    while low < high:
        middle = (low + high) // 2
        if length(render(_without(middle, system, old, newest))) + reserve <= limit:
            high = middle
        else:
            low = middle + 1
    prompt = render(_without(low, system, old, newest))
    return _last_chance(prompt, low, length(prompt), limit, max_tokens)


def _without(dropped: int, system: Messages, old: Sequence[Messages], newest: Messages) -> Messages:
    return (*system, *(message for turn in old[dropped:] for message in turn), *newest)


def _last_chance(prompt: P, dropped: int, tokens: int, limit: int, max_tokens: int) -> Fitted[P]:
    if tokens + 1 <= limit:
        return Fitted(prompt, dropped, min(max_tokens, limit - tokens))
    raise ContextLengthExceeded(
        f"The prompt has {tokens} tokens; the model holds {limit} with the reply. Shorten the message or the history.",
        details={"promptTokens": tokens, "contextLength": limit, "maxTokens": max_tokens},
    )
