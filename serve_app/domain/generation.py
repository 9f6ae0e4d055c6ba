"""What is asked of a model and what comes back: the vocabulary between gateway, engines and providers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal

from serve_app.domain.errors import InvalidInput

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Priority(IntEnum):
    """Order of service; a lower number is served first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A verified, upright image in one of the stored media types; ``data`` is the encoded file."""

    media_type: str
    data: bytes = field(repr=False)


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: its parts in the order in which they were given."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, role: Role | str, text: str, images: tuple[Image, ...] = ()) -> Message:
        """A turn that shows ``images`` before its ``text``."""
        return cls(Role(role), (*images, Text(text)) if text or not images else images)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling of one request. ``None`` means: what the checkpoint's generation config says.

    temperature 0..2 (0 is greedy) · top_p (0..1] · top_k >= 1, or 0 for all · max_tokens >= 1 · seed 0..2**63-1 ·
    at most 16 stop strings of 1..256 characters. Out of range raises :class:`InvalidInput`, naming the field.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("topP", self.top_p, 0, 1, open_low=True)
        _check_range("topK", self.top_k, 0, 1_000_000)
        _check_range("maxTokens", self.max_tokens, 1, 10_000_000)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidInput(f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed.")
        if any(not 1 <= len(stop) <= MAX_STOP_LENGTH for stop in self.stop):
            raise InvalidInput(f"Each stop string must have 1 to {MAX_STOP_LENGTH} characters.")


def _check_range(name: str, value: float | None, low: float, high: float, open_low: bool = False) -> None:
    if value is None:
        return
    if math.isnan(value) or value > high or value < low or (open_low and value == low):
        border = "(" if open_low else "["
        raise InvalidInput(f"{name} is {value:g}; it must lie in {border}{low:g}, {high:g}].")


ContextPolicy = Literal["truncate", "error"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One reply to generate.

    ``trace`` is the W3C carrier (``traceparent``, ``tracestate``) that crosses every border with the request.
    ``context_policy``: whether turns that do not fit the model's context are dropped (oldest first, never the system
    prompt or the last message) or refused. ``continue_final``: go on with the last, unfinished assistant message.
    """

    request_id: str
    model: str
    messages: tuple[Message, ...]
    options: Options = Options()
    priority: Priority = Priority.HIGH
    caller: str = "anonymous"
    context_policy: ContextPolicy = "truncate"
    continue_final: bool = False
    trace: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidInput("The request has no message.")
        last = self.messages[-1]
        if self.continue_final:
            if last.role is not Role.ASSISTANT:
                raise InvalidInput("Only an assistant message can be continued.")
        elif not last.text.strip() and not last.images:
            raise InvalidInput("The message is empty.")

    @property
    def has_images(self) -> bool:
        return any(message.images for message in self.messages)


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply, as the model's own tokenizer counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_json(self) -> dict[str, int]:
        return {
            "promptTokens": self.prompt_tokens,
            "completionTokens": self.completion_tokens,
            "cachedTokens": self.cached_tokens,
            "totalTokens": self.total_tokens,
        }


@dataclass(frozen=True, slots=True)
class EngineTiming:
    """Seconds that the engine itself spent: waiting in its queue, prefill (to the first token), decode."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one reply went, in seconds; one record feeds the event, the span and the metrics."""

    queued_s: float = 0.0
    load_s: float = 0.0
    ttft_s: float | None = None
    decode_s: float = 0.0
    total_s: float = 0.0

    def to_json(self) -> dict[str, float | None]:
        return {
            "queuedMs": round(self.queued_s * 1000, 1),
            "loadMs": round(self.load_s * 1000, 1),
            "ttftMs": None if self.ttft_s is None else round(self.ttft_s * 1000, 1),
            "decodeMs": round(self.decode_s * 1000, 1),
            "totalMs": round(self.total_s * 1000, 1),
        }


@dataclass(frozen=True, slots=True)
class Accepted:
    """First item of every stream: the prompt was rendered and fits. ``dropped`` counts turns left out of it."""

    prompt_tokens: int
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that will not be taken back, with the ids of the tokens that made it."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """Last item of every stream that succeeds. ``stop`` is the stop string that ended it, if one did."""

    reason: FinishReason
    usage: Usage
    timing: EngineTiming = EngineTiming()
    stop: str | None = None


Item = Accepted | Delta | Finish
