"""What OpenAI's clients ask for (https://platform.openai.com/docs/api-reference/chat), as the platform's own request.

Fields that change nothing about the answer are ignored, whatever they are called. Those that would change it and are
not supported are refused by name: an answer that silently lacks what was asked for is worse than none. Beyond OpenAI's
own fields those of vLLM are read: ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``stop_token_ids``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from serve_app.api.images import ImageIntake
from serve_app.api.openai_messages import read_format, read_messages, read_tools
from serve_app.api.validation import read
from serve_app.domain.catalog import Capability
from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import GenerationRequest, JsonFormat, Options, Priority
from serve_app.domain.prompt_length import least_tokens
from serve_app.domain.routing import Ask
from serve_app.telemetry.tracing import Trail

MAX_CHOICES = 8
SEEDS = 2**63
_NAMES = {to_camel(option.name): option.name for option in fields(Options)}
_CAMEL = re.compile(rf"\b({'|'.join(_NAMES)})\b")


class Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class StreamOptions(Lenient):
    include_usage: bool = False


class SamplingBody(Lenient):
    """What chat and text completions have in common; what is not named is in ``model_extra``."""

    model: str
    n: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def choices(self) -> int:
        """How many answers are wanted to each prompt.

        Raises:
            InvalidInput: not 1 to 8.
        """
        wanted = 1 if self.n is None else self.n
        if not 1 <= wanted <= MAX_CHOICES:
            raise wrong("n", f"n is {wanted}; it must lie in [1, {MAX_CHOICES}].")
        return wanted

    def options(self, most: int | None, logprobs: int | None, form: JsonFormat | None = None) -> Options:
        """Raises InvalidInput for a value out of its range, by the name it has here."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Options(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=most,
            stop=tuple(stop),
            seed=self.seed,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            logit_bias=_bias(self.logit_bias or {}),
            response_format=form,
        )


class ChatMessage(Lenient):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatBody(SamplingBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A parsed request: one generation for each choice, and how the answer is wanted.

    ``choices`` is the number of answers to each prompt; those of one prompt follow each other in ``requests``.
    """

    requests: tuple[GenerationRequest, ...]
    needs: frozenset[Capability]
    model: str
    choices: int
    stream: bool
    include_usage: bool

    def ask(self, request: GenerationRequest) -> Ask:
        """What the router is asked for one of the requests."""
        return Ask(
            request.request_id,
            self.model,
            self.needs,
            priority=request.priority,
            caller=request.caller,
            least_tokens=least_tokens(request),
        )


def _empty(value: Any) -> bool:
    return not value


# Whether each field, as given, leaves the answer as it would be without it.
_WITHOUT_EFFECT: Mapping[str, Callable[[Any], bool]] = {
    "functions": _empty,
    "function_call": lambda value: value in (None, "none", "auto"),
    "audio": _empty,
    "modalities": lambda value: value in (None, [], ["text"]),
    "web_search_options": lambda value: value is None,
}


async def read_chat(value: Any, intake: ImageIntake, caller: str, trace: Trail) -> Order:
    """The request in the JSON body of a chat completion.

    Raises:
        InvalidInput: a field is wrong or not supported; ``details["param"]`` names it.
        PayloadTooLarge, UnsupportedMedia: an image cannot be taken.
    """
    body = read(ChatBody, value)
    refuse_unsupported(body.model_extra or {}, _WITHOUT_EFFECT)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    with named_as_here():
        request = GenerationRequest(
            request_id=secrets.token_hex(16),
            model=body.model,
            messages=await read_messages(body.messages, intake),
            options=body.options(most, _logprobs(body), read_format(body.response_format)),
            priority=Priority.HIGH if body.stream else Priority.NORMAL,
            caller=caller,
            context_policy="error",
            trace=trace.carrier(),
            tools=read_tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        )
    needs = {Capability.CHAT}
    needs |= {Capability.VISION} if request.has_images else set()
    needs |= {Capability.TOOLS} if request.has_tools else set()
    return order_of(body, [request], needs)


def order_of(body: SamplingBody, requests: list[GenerationRequest], needs: set[Capability]) -> Order:
    """The order for as many choices of each request as the body wants."""
    every = tuple(choice for request in requests for choice in _choices(request, body.choices))
    return Order(every, frozenset(needs), body.model, body.choices, bool(body.stream), body.include_usage)


def _choices(request: GenerationRequest, count: int) -> Iterator[GenerationRequest]:
    """Requests that share their prompt; with a seed each has its own, counted on from it."""
    yield request
    for number in range(1, count):
        seed = request.options.seed
        options = request.options if seed is None else replace(request.options, seed=(seed + number) % SEEDS)
        yield replace(request, request_id=secrets.token_hex(16), options=options)


def refuse_unsupported(extra: Mapping[str, Any], without_effect: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raises InvalidInput for a field that would change the answer; the table says when it would not."""
    for name, has_no_effect in without_effect.items():
        if not has_no_effect(extra.get(name)):
            raise wrong(name, f"{name} is not supported here with this value. Leave it out, or ask another server.")


def wrong(param: str, message: str) -> InvalidInput:
    return InvalidInput(message, details={"param": param})


@contextmanager
def named_as_here() -> Iterator[None]:
    """Names in errors as this protocol writes them: ``top_p``, not ``topP``."""
    try:
        yield
    except InvalidInput as error:
        raise in_snake_case(error) from error


def in_snake_case(error: InvalidInput) -> InvalidInput:
    """The error with the names that this protocol's clients used."""

    def snake(text: str) -> str:
        return _CAMEL.sub(lambda found: _NAMES[found[0]], text)

    details = {**error.details, "param": snake(error.details["param"])} if "param" in error.details else error.details
    return type(error)(snake(error.message), error.provider, error.retryable, details)


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true.")
    return (body.top_logprobs or 0) if body.logprobs else None


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    if not all(re.fullmatch(r"\d{1,9}", token) for token in given):
        raise wrong("logit_bias", "The keys of logit_bias must be numbers of tokens.")
    return {int(token): value for token, value in given.items()}
