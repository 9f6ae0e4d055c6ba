"""What a remote server's refusal means: its HTTP status and words as one of our errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    InvalidInput,
    MemoryExceeded,
    ModelNotFound,
    PayloadTooLarge,
    ProviderError,
    RateLimited,
    RotundaError,
    UnsupportedMedia,
)

MOST_WORDS = 300
"""Characters of a server's own sentence that reach our reader."""

_CONTEXT = re.compile(r"context.?(length|window|size)|maximum context|too many (input )?tokens", re.IGNORECASE)
_CAPABILITY = re.compile(r"(does|do)(n't| not) support|not supported by|capability.missing", re.IGNORECASE)
_MEMORY = re.compile(r"requires more (system )?memory|out of memory", re.IGNORECASE)
_WRONG = {400: InvalidInput, 413: PayloadTooLarge, 415: UnsupportedMedia, 422: InvalidInput}


def words_of(body: bytes | str) -> str:
    """The sentence in an error body: Ollama's ``{"error": "…"}``, OpenAI's ``{"error": {"message": …}}``, FastAPI's
    ``{"detail": …}``, or the text itself."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = text
    return sentence(data)


def code_of(body: bytes) -> str:
    """The machine's name of an error, as OpenAI writes it (``{"error": {"code": …}}``); empty without one."""
    try:
        found = json.loads(body)["error"]["code"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def sentence(data: Any) -> str:
    """The words of an error as a server gives it, in one line of bounded length."""
    found = data
    for key in ("error", "message", "detail"):
        if isinstance(found, Mapping) and found.get(key):
            found = found[key]
    text = found if isinstance(found, str) else json.dumps(found)
    if isinstance(data, str) and text.lstrip().startswith("<"):
        return ""  # a proxy's page is no sentence
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= MOST_WORDS else f"{line[: MOST_WORDS - 1]}…"


def refusal(
    provider: str,
    status: int,
    words: str,
    model: str | None = None,
    retry_after_s: int | None = None,
    code: str = "",
) -> RotundaError:
    """The error for an answer that is none.

    Args:
        provider: name of the provider.
        status: of the HTTP response; 500 for an error that comes in the middle of a stream.
        words: what :func:`words_of` the body says.
        model: the model that was asked, when one was.
        retry_after_s: seconds of its ``Retry-After`` header.
        code: what :func:`code_of` the body says.
    """
    said = f": {words}" if words else "."
    hint = {} if retry_after_s is None else {"retryAfterS": retry_after_s}
    if status in (401, 403):
        # The caller's own key is right; ours is not. The words may repeat a part of it.
        return ProviderError(f"{provider} refuses our key ({status}). Look at its settings.", provider, False)
    if status == 429:
        return RateLimited(f"{provider} has too much to do{said}", provider, details=hint)
    if _MEMORY.search(words):
        return MemoryExceeded(f"{provider} has too little memory{said}", provider)
    if status == 404 and model is not None:
        return ModelNotFound(f"{provider} has no model {model}{said}", provider)
    if status in _WRONG:
        return _wrong(provider, status, f"{code} {words}", said)
    if status >= 500 or status == 408:
        return ProviderError(f"{provider} failed ({status}){said}", provider, True, hint)
    return ProviderError(f"{provider} answers {status}{said} Is its address right?", provider, False)


def _wrong(provider: str, status: int, words: str, said: str) -> InvalidInput:
    if _CONTEXT.search(words):
        return ContextLengthExceeded(f"The prompt is too long for the model of {provider}{said}", provider)
    if _CAPABILITY.search(words):
        return CapabilityMissing(f"The model of {provider} cannot do this{said}", provider)
    return _WRONG[status](f"{provider} refuses the request{said}", provider)
