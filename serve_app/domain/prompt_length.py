"""How long a prompt is at least, known without a tokenizer: what can never fit is refused before a model is asked."""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.domain.generation import GenerationRequest, Message, Role

LONGEST_TOKEN = 128
"""Characters of one token at most: the longest runs of one character in the vocabularies that are in use."""


def least_tokens(request: GenerationRequest) -> int:
    """Tokens that no tokenizer can do without: one for each word, since none spans two, and more for long ones.

    Of a conversation that may be shortened, only what stays counts: the system prompt and the newest message.
    """
    messages: Iterable[Message] = request.messages
    if request.context_policy == "truncate":
        messages = [message for message in request.messages[:-1] if message.role is Role.SYSTEM]
        messages += request.messages[-1:]
    return sum(_words(message.text) for message in messages)


def _words(text: str) -> int:
    return sum(1 + (len(word) - 1) // LONGEST_TOKEN for word in text.split())
