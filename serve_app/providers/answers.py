"""Reading JSON that somebody else wrote: every field may be missing, or of another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.domain.generation import TokenLogprob

UNKNOWN_TOKEN = -1
"""Id of a token whose server tells its text only."""


def text_of(data: Any, *names: str) -> str:
    """The first of the fields that is a text with something in it; else the empty one."""
    found = (data.get(name) for name in names) if isinstance(data, Mapping) else ()
    return next((value for value in found if isinstance(value, str) and value), "")


def number(data: Any, name: str) -> int:
    """A whole number that is not negative; 0 for everything else."""
    value = data.get(name) if isinstance(data, Mapping) else None
    return int(value) if isinstance(value, int | float) and value == value and 0 < value < 2**63 else 0


def objects(data: Any, name: str) -> list[Mapping[str, Any]]:
    """The objects in a list; empty when there is no such list."""
    found = data.get(name) if isinstance(data, Mapping) else None
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def logprobs_of(data: Any) -> tuple[TokenLogprob, ...]:
    """Log-probabilities as OpenAI and Ollama write them: ``[{token, logprob, bytes, top_logprobs: […]}, …]``."""
    return tuple(
        TokenLogprob(UNKNOWN_TOKEN, text_of(each, "token"), _real(each.get("logprob")), _data(each), _top(each))
        for each in objects({"list": data}, "list")
    )


def _top(each: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(UNKNOWN_TOKEN, text_of(top, "token"), _real(top.get("logprob")), _data(top))
        for top in objects(each, "top_logprobs")
    )


def _real(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _data(each: Mapping[str, Any]) -> bytes:
    value = each.get("bytes")
    if isinstance(value, list) and all(isinstance(part, int) and 0 <= part < 256 for part in value):
        return bytes(value)
    return text_of(each, "token").encode()
