"""What is asked of a model and what comes back: the vocabulary between gateway, engines and providers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, Literal

from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import InvalidInput
from serve_app.domain.tools import NO_TOOLS, ToolCall, ToolCallPart, ToolUse

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


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
    """One turn: its parts in the order in which they were given.

    ``tool_calls``: what an assistant wanted called. ``tool_call_id`` and ``name``: which call, of which tool, a message
    of the role tool answers.
    """

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

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
class JsonFormat:
    """The reply must be JSON: an object, or whatever fits ``schema`` (JSON Schema, 2020-12)."""

    schema: Mapping[str, Any] | bool | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Sampling of one request. ``None`` means: what the checkpoint's generation config says.

    temperature 0..2 (0 is greedy) · top_p (0..1] · top_k >= 1, or 0 for all · max_tokens >= 1 · seed 0..2**63-1 ·
    at most 16 stop strings of 1..256 characters · min_p 0..1 · repetition_penalty (0..10] · presence_penalty and
    frequency_penalty -2..2 · at most 64 stop_token_ids · min_tokens 0..max_tokens (before them neither an end token
    nor a stop token id is drawn) · logprobs 0..20, the number of alternatives told for each token · logit_bias
    -100..100 for at most 1024 token ids. ``response_format`` goes with neither stop strings, stop tokens nor
    min_tokens: they would cut the JSON or hold its end back. Out of range raises :class:`InvalidInput`, naming the
    field.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    response_format: JsonFormat | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("topP", self.top_p, 0, 1, open_low=True)
        _check_range("topK", self.top_k, 0, 1_000_000)
        _check_range("maxTokens", self.max_tokens, 1, 10_000_000)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        _check_range("minP", self.min_p, 0, 1)
        _check_range("repetitionPenalty", self.repetition_penalty, 0, 10, open_low=True)
        _check_range("presencePenalty", self.presence_penalty, -2, 2)
        _check_range("frequencyPenalty", self.frequency_penalty, -2, 2)
        _check_range("minTokens", self.min_tokens, 0, self.max_tokens or 10_000_000)
        _check_range("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        self._check_stops()
        self._check_bias()
        if self.response_format is not None and self.ends_early:
            raise _wrong("stop", "stop, stopTokenIds and minTokens cannot be combined with a JSON response format.")

    @property
    def ends_early(self) -> bool:
        """Whether the request says itself where its reply ends."""
        return bool(self.stop or self.stop_token_ids or self.min_tokens)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _wrong("stop", f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed.")
        if any(not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH for stop in self.stop):
            raise _wrong("stop", f"Each stop string must have 1 to {MAX_STOP_LENGTH} characters.")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise _wrong("stopTokenIds", f"stopTokenIds may hold at most {MAX_STOP_TOKENS} numbers.")
        if not all(_is_token(token) for token in self.stop_token_ids):
            raise _wrong("stopTokenIds", "stopTokenIds must be numbers of tokens.")

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise _wrong(
                "logitBias", f"logitBias holds {len(self.logit_bias)} tokens; at most {MAX_BIASED_TOKENS} are allowed."
            )
        if not all(_is_token(token) for token in self.logit_bias):
            raise _wrong("logitBias", "The keys of logitBias must be numbers of tokens.")
        for value in self.logit_bias.values():
            _check_range("logitBias", value, -100, 100)


def _wrong(name: str, message: str) -> InvalidInput:
    return InvalidInput(message, details={"param": name})


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _check_range(name: str, value: float | None, low: float, high: float, open_low: bool = False) -> None:
    if value is None:
        return
    if math.isnan(value) or value > high or value < low or (open_low and value == low):
        border = "(" if open_low else "["
        raise _wrong(name, f"{name} is {value:g}; it must lie in {border}{low:g}, {high:g}].")


ContextPolicy = Literal["truncate", "error"]


@dataclass(eq=False, slots=True)
class Marks:
    """What an engine notes while it works on a request, in monotonic seconds of its process: when it began to read the
    prompt, and when it had the first token. So the time of a reply that never ends is accounted for too."""

    started: float | None = None
    first: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One reply to generate.

    ``trace`` is the W3C carrier (``traceparent``, ``tracestate``) that crosses every border with the request.
    ``context_policy``: whether turns that do not fit the model's context are dropped (oldest first, never the system
    prompt or the last message) or refused. ``continue_final``: go on with the last, unfinished assistant message.
    ``raw``: the text of the only message is the prompt as the model reads it, control tokens included, without a chat
    template. ``tools``: what the model may call. ``continuation``: what the reply has come to already. ``draw_seed``:
    seeds the sampling where the options give no seed, so that another replica can go on with the same draws.
    ``marks``: filled in by the engine.
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
    tools: ToolUse = NO_TOOLS
    raw: bool = False
    continuation: Continuation | None = None
    draw_seed: int | None = None
    marks: Marks = field(default_factory=Marks, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidInput("The request has no message.")
        if self.raw and (len(self.messages) > 1 or self.has_images or self.continue_final or self.tools.offered):
            raise InvalidInput("A raw prompt is one text.")
        if self.tools.forced and (self.options.ends_early or self.options.response_format):
            raise _wrong("tool_choice", "A forced tool call goes with neither stop, minTokens nor a response format.")
        if self.continuation is not None and (self.tools.forced or self.options.response_format):
            raise InvalidInput("A reply that must have a form cannot be continued.")
        last = self.messages[-1]
        if self.continue_final:
            if last.role is not Role.ASSISTANT:
                raise InvalidInput("Only an assistant message can be continued.")
        elif not last.text.strip() and not last.images and last.role is not Role.TOOL and not (self.raw and last.text):
            raise InvalidInput("The message is empty.")

    @property
    def has_images(self) -> bool:
        return any(message.images for message in self.messages)

    @property
    def has_tools(self) -> bool:
        """Whether the prompt speaks of tools: offered ones, or calls and results in the history."""
        spoken = any(message.tool_calls or message.role is Role.TOOL for message in self.messages)
        return self.tools.offered or spoken

    @property
    def seed(self) -> int | None:
        """What the sampling is seeded with; None: nobody can repeat it."""
        return self.options.seed if self.options.seed is not None else self.draw_seed

    def begun(self, text: str) -> GenerationRequest:
        """The same request for a reply that begins with ``text`` (its last blanks left out, see Continuation)."""
        *before, last = self.messages
        text = text.rstrip()
        if self.raw or self.continue_final:
            messages = (*before, replace(last, parts=(*last.parts, Text(text))))
        else:
            messages = (*self.messages, Message.of(Role.ASSISTANT, text))
        return replace(self, messages=messages, continue_final=not self.raw, continuation=None)


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
    """First item of every stream: the prompt was rendered and fits. ``dropped`` counts turns left out of it.

    ``revision`` is the model's, where its token ids can be continued (:class:`Continuation`). A reply that is continued
    has the same ``prompt_tokens`` when it is continued by ids; by text they include the text so far.

    ``load`` is the carrier of the trace in which the model came into memory.
    """

    prompt_tokens: int
    dropped: int = 0
    revision: str | None = None
    load: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability under the model itself: before bias, penalties, grammar and temperature.

    ``top`` holds the likeliest tokens at its place, likeliest first. ``token`` is the text of ``data``, which may be a
    part of a character (U+FFFD in the text).
    """

    token_id: int
    token: str
    logprob: float
    data: bytes = b""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that will not be taken back, with the ids of the tokens that made it.

    The ids of all deltas of an attempt so far, joined, are its tokens so far, with nothing left out; their texts joined
    are the answer so far, and a delta's offset is the length of that (in code points) before it. A continued reply
    gives only deltas that follow (:class:`Continuation`).

    ``reasoning`` is what the model thinks before it answers, kept apart from ``text``; ``tool_calls`` are parts of
    calls, in order. ``logprobs`` belong to the tokens of ``text``, when they were asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens it stands for: a server that tells no ids sends a token at a time."""
        return len(self.token_ids) or 1

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """All of them as one, in their order."""
        return cls(
            "".join(delta.text for delta in deltas),
            tuple(token for delta in deltas for token in delta.token_ids),
            "".join(delta.reasoning for delta in deltas),
            tuple(part for delta in deltas for part in delta.tool_calls),
            tuple(entry for delta in deltas for entry in delta.logprobs),
        )

    def __add__(self, later: Delta) -> Delta:
        """Both as one."""
        return Delta.joined((self, later))


@dataclass(frozen=True, slots=True)
class Finish:
    """Last item of every stream that succeeds. ``stop`` is the stop string that ended it, if one did.

    ``usage`` of a reply that was continued holds the completion tokens that came after the :class:`Continuation`.
    """

    reason: FinishReason
    usage: Usage
    timing: EngineTiming = EngineTiming()
    stop: str | None = None


Item = Accepted | Delta | Finish
