"""OpenAI-compatible servers (https://platform.openai.com/docs/api-reference/chat/streaming).

A streamed answer is a sequence of server-sent events. A choice that ends has a ``finish_reason``; without one the
answer was cut off, whatever else came. Usage comes in an event of its own after it, from servers that know
``stream_options``; from the others it stays 0, which means unknown. An error may come as an event in the middle.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from serve_app.config import Settings, UpstreamArgs, read_secret
from serve_app.domain.catalog import Capability, ModelInfo, Task
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import CapabilityMissing, InvalidConfig, InvalidInput, ModelNotFound, ProviderError
from serve_app.domain.generation import (
    Accepted,
    Delta,
    Finish,
    FinishReason,
    GenerationRequest,
    Image,
    Item,
    Message,
    Options,
    Role,
    Text,
    Usage,
)
from serve_app.domain.tools import ToolCallPart, ToolUse
from serve_app.providers.answers import logprobs_of, number, objects, text_of
from serve_app.providers.begun import by_text, spent_whole
from serve_app.providers.probing import Probes, Way
from serve_app.providers.refusals import sentence
from serve_app.providers.sse import SseReader, TooLong
from serve_app.providers.wire import MOST_LINE, Stream, Wire, times_of

ASSUMED = frozenset({Capability.CHAT, Capability.COMPLETION, Capability.VISION, Capability.TOOLS})
"""What a model is taken for whose server does not say: nothing is refused here that the server might allow."""
CONTEXT_FIELDS = ("context_length", "max_model_len", "context_window", "max_context_length", "n_ctx")
"""Where servers write the context length (OpenRouter, vLLM, Groq, LM Studio, llama.cpp)."""
REASONS = {
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
STANDARD = ("temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty")
COMMON = ("top_k", "min_p", "repetition_penalty", "min_tokens")
"""Not of OpenAI itself but of most servers that speak its protocol; one that has them not says so."""


def create(args: UpstreamArgs, settings: Settings) -> OpenAI:
    """The provider; without an address in the arguments, that of OPENAI_BASE_URL with OPENAI_API_KEY."""
    url, key = args.base_url, read_secret(args.api_key_env, args.api_key_file, home=settings.rotunda_home)
    if url is None:
        if settings.openai_base_url is None:
            raise InvalidConfig(
                f"{args.provider} has no address: give it a base_url, or set OPENAI_BASE_URL.", args.provider
            )
        url = settings.openai_base_url.get_secret_value()
        # The key of the settings belongs to their address; it is never sent to another one.
        key = key or settings.openai_api_key
    times = times_of(settings)
    return OpenAI(Wire(args.provider, url, key.get_secret_value() if key else None, times), args.continue_replies)


def implied(settings: Settings) -> UpstreamArgs | None:
    """The provider ``openai`` of OPENAI_BASE_URL, or of OPENAI_API_KEY alone."""
    return UpstreamArgs(provider="openai", kind="openai") if settings.openai_base_url else None


class OpenAI:
    """One OpenAI-compatible server.

    Args:
        wire: HTTP to it.
        continues: whether it may be tried whether it goes on with begun replies (serve_app/providers/probing.py).
    """

    def __init__(self, wire: Wire, continues: bool = True) -> None:
        self._wire = wire
        self._probes = Probes(self._said) if continues else None
        self._refused: dict[str, frozenset[str]] = {}
        """Fields that a model's server has refused and that can be left out or renamed."""

    async def list_models(self) -> tuple[ModelInfo, ...]:
        answer = await self._wire.get("/models")
        found = objects({"data": answer} if isinstance(answer, list) else answer, "data")
        return tuple(_info(each) for each in found if text_of(each, "id"))

    async def describe(self, model: str) -> ModelInfo:
        for info in await self.list_models():
            if info.id == model:
                return info
        raise ModelNotFound(f"{self._wire.provider} has no model {model}.", self._wire.provider)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        if over := spent_whole(request):
            for item in over:
                yield item
            return
        if request.continuation is not None:
            request = by_text(request, request.continuation)
        way = await self._way(request.model) if request.continue_final else None
        async with aclosing(self._replies(request, way)) as items:
            async for item in items:
                yield item

    async def _way(self, model: str) -> Way:
        if self._probes is None:
            raise CapabilityMissing("This provider is not asked to go on with replies.", self._wire.provider)
        return await self._probes.way(model)

    async def _said(self, request: GenerationRequest, way: Way | None) -> str:
        async with aclosing(self._replies(request, way)) as items:
            return "".join([item.text async for item in items if isinstance(item, Delta)])

    async def _replies(self, request: GenerationRequest, way: Way | None) -> AsyncGenerator[Item, None]:
        stream = await self._open(request, way)
        reply = _Reply()
        try:
            yield Accepted(0)
            async with aclosing(self._events(stream)) as events:
                async for event in events:
                    for item in reply.read(event):
                        yield item
            if reply.finish is None:
                raise self._wire.broken_off()
            await stream.drain()
            yield reply.finish
        finally:
            await stream.close()

    async def _open(self, request: GenerationRequest, way: Way | None) -> Stream:
        """Ask; a field that the server does not know and that can be missed is left out the second time."""
        path = "/completions" if request.raw else "/chat/completions"
        while True:
            refused = self._refused.get(request.model, frozenset())
            body = request_body(request, refused, way)
            try:
                stream = await self._wire.open(path, body, request.model, dict(request.trace))
            except InvalidInput as error:
                learned = {name for name in ("stream_options", "max_completion_tokens") if name in error.message}
                if learned <= refused:
                    raise
                self._refused[request.model] = refused | learned
                continue
            if stream.content_type == "application/json":
                await self._refuse_whole(stream)
            return stream

    async def _refuse_whole(self, stream: Stream) -> None:
        """An error with status 200, or a server that does not stream."""
        try:
            async with aclosing(stream.lines()) as lines:
                first = [line async for line in lines]
        finally:
            await stream.close()
        answer = self._wire.parsed(b"\n".join(first))
        if isinstance(answer, Mapping) and answer.get("error"):
            raise self._wire.failure(sentence(answer))
        raise ProviderError(f"{self._wire.provider} does not stream its answers.", self._wire.provider, False)

    async def _events(self, stream: Stream) -> AsyncGenerator[Mapping[str, Any], None]:
        """The JSON objects up to ``[DONE]`` or the end."""
        reader = SseReader(MOST_LINE)
        async with aclosing(stream.chunks()) as chunks:
            async for chunk in chunks:
                for data in self._fed(reader, chunk):
                    if data.strip() == b"[DONE]":
                        return
                    event = self._wire.parsed(data)
                    if not isinstance(event, Mapping):
                        raise self._wire.nonsense("an event holds no object")
                    if event.get("error"):
                        raise self._wire.failure(sentence(event))
                    yield event

    def _fed(self, reader: SseReader, chunk: bytes) -> Iterator[bytes]:
        try:
            yield from reader.feed(chunk)
        except TooLong:
            raise self._wire.nonsense(f"an event has more than {MOST_LINE} bytes") from None

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        body = {"model": request.model, "input": list(request.texts), "encoding_format": "float"}
        answer = await self._wire.post(
            "/embeddings", body, request.model, self._wire.times.first_token_s, request.trace
        )
        rows = sorted(objects(answer, "data"), key=lambda row: number(row, "index"))
        try:
            vectors = tuple(tuple(float(value) for value in row["embedding"]) for row in rows)
        except (TypeError, ValueError, KeyError):
            raise self._wire.nonsense("it holds no embeddings") from None
        if len(vectors) != len(request.texts):
            raise self._wire.nonsense("it holds too few embeddings")
        return Embeddings(vectors, number(answer.get("usage"), "prompt_tokens"))

    async def health(self) -> None:
        await self._wire.get("/models")

    async def residency(self) -> Mapping[str, int] | None:
        return None

    async def load(self, model: str) -> None:
        raise self._alone()

    async def unload(self, model: str) -> None:
        raise self._alone()

    def _alone(self) -> CapabilityMissing:
        provider = self._wire.provider
        return CapabilityMissing(f"{provider} decides by itself which models it keeps in memory.", provider)

    async def close(self) -> None:
        await self._wire.close()


def request_body(
    request: GenerationRequest, refused: frozenset[str] = frozenset(), way: Way | None = None
) -> dict[str, Any]:
    """The JSON body that asks for this reply, without the fields in ``refused``; ``way``: how to go on with its
    last message."""
    body: dict[str, Any] = {"model": request.model, "stream": True, **_options(request.options)}
    if "stream_options" not in refused:
        body["stream_options"] = {"include_usage": True}
    if "max_completion_tokens" in refused and "max_tokens" in body:
        # OpenAI's reasoning models refuse the old name, and say the new one.
        body["max_completion_tokens"] = body.pop("max_tokens")
    if request.raw:
        return body | {"prompt": request.messages[0].text}
    if request.tools.offered:
        body |= _tools(request.tools)
    messages = [_message(message) for message in request.messages]
    if way is not None:
        messages[-1] |= way.last
        body |= way.fields
    return body | {"messages": messages}


def _options(options: Options) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in (*STANDARD, *COMMON) if getattr(options, name) is not None}
    found |= {"stop": list(options.stop)} if options.stop else {}
    found |= {"stop_token_ids": list(options.stop_token_ids)} if options.stop_token_ids else {}
    if options.logit_bias:
        found["logit_bias"] = {str(token): bias for token, bias in options.logit_bias.items()}
    if options.logprobs is not None:
        found |= {"logprobs": True, "top_logprobs": options.logprobs}
    if options.response_format is not None:
        found["response_format"] = _response_format(options.response_format.schema)
    return found


def _response_format(schema: Mapping[str, Any] | bool | None) -> dict[str, Any]:
    if schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}


def _tools(use: ToolUse) -> dict[str, Any]:
    choice: Any = {"type": "function", "function": {"name": use.name}} if use.name else use.choice
    found: dict[str, Any] = {"tools": [tool.to_json() for tool in use.tools], "tool_choice": choice}
    return found if use.parallel else found | {"parallel_tool_calls": False}


def _message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role.value, "content": _content(message)}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        found["content"] = found["content"] or None
    if message.role is Role.TOOL and message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


def _content(message: Message) -> Any:
    """A text, or parts in their order as soon as there is an image among them."""
    return [_part(part) for part in message.parts] if message.images else message.text


def _part(part: Text | Image) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    url = f"data:{part.media_type};base64,{base64.b64encode(part.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@dataclass
class _Reply:
    """What was read of one streamed answer."""

    reason: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)

    @property
    def finish(self) -> Finish | None:
        return None if self.reason is None else Finish(self.reason, self.usage)

    def read(self, event: Mapping[str, Any]) -> list[Item]:
        if isinstance(event.get("usage"), Mapping):
            self.usage = _usage(event["usage"])
        items: list[Item] = []
        for choice in objects(event, "choices"):
            if number(choice, "index"):
                continue  # only one was asked for
            delta = _delta(choice)
            if delta != Delta(""):
                items.append(delta)
            reason = choice.get("finish_reason")
            if reason:
                self.reason = REASONS.get(str(reason), FinishReason.STOP)
        return items


def _delta(choice: Mapping[str, Any]) -> Delta:
    delta = choice.get("delta")
    inner = delta if isinstance(delta, Mapping) else {}
    logprobs = choice.get("logprobs")
    return Delta(
        # Some servers write content as a list of parts; OpenAI puts a refusal beside it.
        text_of(inner, "content", "refusal")
        or "".join(text_of(part, "text") for part in objects(inner, "content"))
        or text_of(choice, "text"),
        reasoning=text_of(inner, "reasoning_content", "reasoning"),
        tool_calls=tuple(_call(call) for call in objects(inner, "tool_calls")),
        logprobs=logprobs_of(logprobs.get("content")) if isinstance(logprobs, Mapping) else (),
    )


def _call(call: Mapping[str, Any]) -> ToolCallPart:
    function = call.get("function")
    return ToolCallPart(
        number(call, "index"),
        text_of(function, "arguments"),
        text_of(call, "id") or None,
        text_of(function, "name") or None,
    )


def _usage(usage: Mapping[str, Any]) -> Usage:
    cached = number(usage.get("prompt_tokens_details"), "cached_tokens")
    return Usage(number(usage, "prompt_tokens"), number(usage, "completion_tokens"), cached)


def _info(model: Mapping[str, Any]) -> ModelInfo:
    meta = model.get("meta")
    places = (model, meta if isinstance(meta, Mapping) else {})
    lengths = [number(place, name) for place in places for name in (*CONTEXT_FIELDS, "n_ctx_train")]
    return ModelInfo(
        id=text_of(model, "id"),
        path="",
        task=Task.TEXT_GENERATION,
        context_length=next((length for length in lengths if length), None),
        capabilities=_capabilities(model),
    )


def _capabilities(model: Mapping[str, Any]) -> frozenset[Capability]:
    about = model.get("architecture")
    inputs = about.get("input_modalities") if isinstance(about, Mapping) else None
    return ASSUMED - {Capability.VISION} if isinstance(inputs, list) and "image" not in inputs else ASSUMED
