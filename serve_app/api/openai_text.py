"""``POST /v1/completions`` (https://platform.openai.com/docs/api-reference/completions): a text goes on.

The prompt is read as it stands, control tokens included, without a chat template.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from serve_app.api.openai_request import Order, SamplingBody, named_as_here, order_of, refuse_unsupported, wrong
from serve_app.api.validation import read
from serve_app.domain.catalog import Capability
from serve_app.domain.generation import Delta, Finish, GenerationRequest, Message, Options, Priority, TokenLogprob
from serve_app.telemetry.tracing import Trail

MAX_PROMPTS = 32
MAX_TOKENS = 16
"""Of a request that does not say: the protocol's own default."""


class CompletionBody(SamplingBody):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[str]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


_WITHOUT_EFFECT: Mapping[str, Callable[[Any], bool]] = {
    "echo": lambda value: not value,
    "suffix": lambda value: not value,
    "best_of": lambda value: value in (None, 1),
}


def read_completion(value: Any, caller: str, trace: Trail) -> Order:
    """The request in the JSON body of a text completion.

    Raises:
        InvalidInput: a field is wrong or not supported; ``details["param"]`` names it.
    """
    body = read(CompletionBody, value)
    refuse_unsupported(body.model_dump(include=set(_WITHOUT_EFFECT)), _WITHOUT_EFFECT)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise wrong("prompt", f"prompt must hold 1 to {MAX_PROMPTS} texts.")
    with named_as_here():
        options = body.options(MAX_TOKENS if body.max_tokens is None else body.max_tokens, body.logprobs)
        requests = [_request(body, prompt, options, caller, trace) for prompt in prompts]
    return order_of(body, requests, {Capability.COMPLETION})


def _request(body: CompletionBody, prompt: str, options: Options, caller: str, trace: Trail) -> GenerationRequest:
    return GenerationRequest(
        request_id=secrets.token_hex(16),
        model=body.model,
        messages=(Message.of("user", prompt),),
        options=options,
        priority=Priority.HIGH if body.stream else Priority.NORMAL,
        caller=caller,
        context_policy="error",
        trace=trace.carrier(),
        raw=True,
    )


class TextShape:
    """The JSON of text completions."""

    prefix = "cmpl-"
    whole_kind = chunk_kind = "text_completion"

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's text; there is none."""
        return None

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The choice of a streamed piece; None when it says nothing."""
        text = delta.reasoning + delta.text
        return self._choice(index, text, delta.logprobs, None) if text else None

    def last(self, index: int, finish: Finish) -> dict[str, Any]:
        return self._choice(index, "", (), finish.reason.value)

    def whole(self, index: int, delta: Delta, finish: Finish) -> dict[str, Any]:
        return self._choice(index, delta.reasoning + delta.text, delta.logprobs, finish.reason.value)

    def _choice(self, index: int, text: str, logprobs: tuple[TokenLogprob, ...], reason: str | None) -> dict[str, Any]:
        begin = self._offsets.get(index, 0)
        self._offsets[index] = begin + len(text)
        told = _logprobs(logprobs, begin) if logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


def _logprobs(entries: tuple[TokenLogprob, ...], begin: int) -> dict[str, Any]:
    offsets = []
    for entry in entries:
        offsets.append(begin)
        begin += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{other.token: other.logprob for other in entry.top} for entry in entries],
        "text_offset": offsets,
    }
