"""Ollama servers (https://github.com/ollama/ollama/blob/main/docs/api.md).

Answers are JSON objects, one per line. Go leaves U+0085 raw in its JSON, so lines are split on byte 0x0A alone. A line
``{"error": …}`` may come after any other, and a stream that ends without ``"done": true`` was cut off.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serve_app.config import Settings, UpstreamArgs, read_secret
from serve_app.domain.catalog import Capability, ModelInfo, Task
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import CapabilityMissing, InvalidConfig, RotundaError
from serve_app.domain.generation import (
    Accepted,
    Delta,
    EngineTiming,
    Finish,
    FinishReason,
    GenerationRequest,
    Item,
    Message,
    Options,
    Role,
    Usage,
)
from serve_app.domain.tools import ToolCallPart
from serve_app.providers.answers import logprobs_of, number, objects, text_of
from serve_app.providers.begun import by_text, spent_whole
from serve_app.providers.refusals import sentence
from serve_app.providers.wire import Wire, times_of

DESCRIBED_AT_ONCE = 4

CAPABILITIES = {
    "completion": frozenset({Capability.CHAT, Capability.COMPLETION}),
    "vision": frozenset({Capability.VISION}),
    "tools": frozenset({Capability.TOOLS}),
    "embedding": frozenset({Capability.EMBEDDINGS}),
}
"""What ``/api/show`` says, in our words; others (insert, thinking) mean nothing to us."""

REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "num_predict",
    "seed": "seed",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
"""Our names of sampling options, and Ollama's."""
UNKNOWN_OPTIONS = ("stop_token_ids", "min_tokens", "logit_bias")


def create(args: UpstreamArgs, settings: Settings) -> Ollama:
    """The provider; its address is that of the arguments, else OLLAMA_HOST."""
    url = args.base_url or (settings.ollama_host.get_secret_value() if settings.ollama_host else None)
    if url is None:
        raise InvalidConfig(f"{args.provider} has no address: give it a base_url, or set OLLAMA_HOST.", args.provider)
    key = read_secret(args.api_key_env, args.api_key_file, home=settings.rotunda_home)
    times = times_of(settings)
    return Ollama(Wire(args.provider, url, key.get_secret_value() if key else None, times), args.continue_replies)


def implied(settings: Settings) -> UpstreamArgs | None:
    """The provider ``ollama`` of OLLAMA_HOST."""
    return UpstreamArgs(provider="ollama", kind="ollama") if settings.ollama_host else None


class Ollama:
    """One Ollama server.

    Args:
        wire: HTTP to it.
        continues: whether it is asked to go on with begun replies; it goes on with a last message of the assistant.
    """

    def __init__(self, wire: Wire, continues: bool = True) -> None:
        self._wire = wire
        self._continues = continues
        self._described: dict[str, ModelInfo] = {}
        """What ``/api/show`` said, by name and digest: asking again for each listing would be one call per model."""

    async def list_models(self) -> tuple[ModelInfo, ...]:
        tags = objects(await self._wire.get("/api/tags"), "models")
        slots = asyncio.Semaphore(DESCRIBED_AT_ONCE)

        async def described(tag: Mapping[str, Any]) -> ModelInfo:
            async with slots:
                return await self._described_tag(tag)

        infos = tuple(await asyncio.gather(*(described(tag) for tag in tags if text_of(tag, "model", "name"))))
        self._described = {f"{info.id}@{info.revision}": info for info in infos if info.capabilities}
        return infos

    async def describe(self, model: str) -> ModelInfo:
        shown = await self._wire.post("/api/show", {"model": model}, model)
        return _info({"model": model}, shown if isinstance(shown, Mapping) else {})

    async def _described_tag(self, tag: Mapping[str, Any]) -> ModelInfo:
        name = text_of(tag, "model", "name")
        known = self._described.get(f"{name}@{text_of(tag, 'digest')}")
        if known is not None:
            return known
        try:
            shown = await self._wire.post("/api/show", {"model": name}, name)
        except RotundaError:
            # One model that cannot be described hides no other; what it can do is then found out by asking it.
            return _info(tag, {})
        return _info(tag, shown if isinstance(shown, Mapping) else {})

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        if over := spent_whole(request):
            for item in over:
                yield item
            return
        if request.continuation is not None:
            if not self._continues:
                raise CapabilityMissing("This provider is not asked to go on with replies.", self._wire.provider)
            request = by_text(request, request.continuation)
        path, body = request_body(request)
        stream = await self._wire.open(path, body, request.model, dict(request.trace))
        reply = _Reply()
        try:
            yield Accepted(0)
            async with aclosing(stream.lines()) as lines:
                async for line in lines:
                    for item in reply.read(self._parsed(line)) if line.strip() else ():
                        if isinstance(item, Finish):
                            await stream.drain()
                        yield item
                    if reply.done:
                        return
            raise self._wire.broken_off()
        finally:
            await stream.close()

    def _parsed(self, line: bytes) -> Mapping[str, Any]:
        chunk = self._wire.parsed(line)
        if not isinstance(chunk, Mapping):
            raise self._wire.nonsense("a line holds no object")
        if chunk.get("error"):
            raise self._wire.failure(sentence(chunk))
        return chunk

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        body = {"model": request.model, "input": list(request.texts), "truncate": False}
        answer = await self._wire.post("/api/embed", body, request.model, self._wire.times.first_token_s, request.trace)
        try:
            vectors = tuple(tuple(float(value) for value in vector) for vector in answer["embeddings"])
        except (TypeError, ValueError, KeyError):
            raise self._wire.nonsense("it holds no embeddings") from None
        if len(vectors) != len(request.texts):
            raise self._wire.nonsense("it holds too few embeddings")
        return Embeddings(vectors, number(answer, "prompt_eval_count"))

    async def health(self) -> None:
        await self._wire.get("/api/version")

    async def residency(self) -> Mapping[str, int] | None:
        running = objects(await self._wire.get("/api/ps"), "models")
        return {text_of(each, "model", "name"): number(each, "size") for each in running}

    async def load(self, model: str) -> None:
        await self._turn(model, {})

    async def unload(self, model: str) -> None:
        await self._turn(model, {"keep_alive": 0})

    async def _turn(self, model: str, more: Mapping[str, Any]) -> None:
        """A chat without messages only loads the model, or unloads it when it is not to be kept."""
        body = {"model": model, "messages": [], "stream": False, **more}
        await self._wire.post("/api/chat", body, model, self._wire.times.first_token_s)

    async def close(self) -> None:
        await self._wire.close()


def request_body(request: GenerationRequest) -> tuple[str, dict[str, Any]]:
    """The path and the JSON body that ask for this reply.

    Raises:
        CapabilityMissing: the request holds an option that Ollama does not have and would silently ignore.
    """
    _refuse_unknown(request)
    body: dict[str, Any] = {
        "model": request.model,
        "stream": True,
        "options": _options(request.options),
        # Older servers ignore it; newer ones would otherwise drop turns without a word.
        "truncate": request.context_policy == "truncate",
    }
    if request.options.response_format is not None:
        schema = request.options.response_format.schema
        body["format"] = dict(schema) if isinstance(schema, Mapping) else "json"
    if request.options.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.options.logprobs}
    if request.raw:
        return "/api/generate", {**body, "prompt": request.messages[0].text, "raw": True}
    if request.tools.offered:
        body["tools"] = [tool.to_json() for tool in request.tools.tools]
    return "/api/chat", {**body, "messages": [_message(message) for message in request.messages]}


def _refuse_unknown(request: GenerationRequest) -> None:
    unknown = [name for name in UNKNOWN_OPTIONS if getattr(request.options, name)]
    if request.tools.forced:
        unknown.append("tool_choice")
    if unknown:
        raise CapabilityMissing(f"Ollama servers do not know {', '.join(unknown)}.", details={"missing": unknown})


def _options(options: Options) -> dict[str, Any]:
    given = {theirs: getattr(options, ours) for ours, theirs in OPTIONS.items()}
    stop = {"stop": list(options.stop)} if options.stop else {}
    return {name: value for name, value in given.items() if value is not None} | stop


def _message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role.value, "content": message.text}
    if message.images:
        found["images"] = [base64.b64encode(image.data).decode() for image in message.images]
    if message.tool_calls:
        found["tool_calls"] = [
            {"function": {"name": call.name, "arguments": _object(call.arguments)}} for call in message.tool_calls
        ]
    if message.role is Role.TOOL and message.name:
        found["tool_name"] = message.name
    return found


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


@dataclass
class _Reply:
    """What was read of one streamed answer."""

    calls: int = 0
    done: bool = False

    def read(self, chunk: Mapping[str, Any]) -> list[Item]:
        message = chunk.get("message")
        inner = message if isinstance(message, Mapping) else {}
        delta = Delta(
            text_of(inner, "content") or text_of(chunk, "response"),
            reasoning=text_of(inner, "thinking") or text_of(chunk, "thinking"),
            tool_calls=tuple(self._call(call) for call in objects(inner, "tool_calls")),
            logprobs=logprobs_of(chunk.get("logprobs")),
        )
        items: list[Item] = [delta] if delta != Delta("") else []
        if chunk.get("done") is True:
            self.done = True
            items.append(self._finish(chunk))
        return items

    def _call(self, call: Mapping[str, Any]) -> ToolCallPart:
        function = call.get("function")
        inner = function if isinstance(function, Mapping) else {}
        self.calls += 1
        arguments = json.dumps(inner.get("arguments") or {}, ensure_ascii=False)
        name = text_of(call, "id") or f"call_{secrets.token_hex(12)}"
        return ToolCallPart(self.calls - 1, arguments, name, text_of(inner, "name"))

    def _finish(self, chunk: Mapping[str, Any]) -> Finish:
        reason = REASONS.get(text_of(chunk, "done_reason"), FinishReason.STOP)
        if self.calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        usage = Usage(number(chunk, "prompt_eval_count"), number(chunk, "eval_count"))
        return Finish(reason, usage, _timing(chunk))


def _timing(chunk: Mapping[str, Any]) -> EngineTiming:
    """Nanoseconds as seconds. What is neither load, prefill nor decode was spent in the server's queue."""
    total, load, prefill, decode = (
        number(chunk, f"{name}_duration") / 1e9 for name in ("total", "load", "prompt_eval", "eval")
    )
    return EngineTiming(max(0.0, total - load - prefill - decode), prefill, decode)


def _info(tag: Mapping[str, Any], shown: Mapping[str, Any]) -> ModelInfo:
    about = shown.get("model_info")
    facts = about if isinstance(about, Mapping) else {}
    details = tag.get("details") or shown.get("details")
    details = details if isinstance(details, Mapping) else {}
    architecture = text_of(facts, "general.architecture") or text_of(details, "family")
    capabilities = _capabilities(shown)
    return ModelInfo(
        id=text_of(tag, "model", "name"),
        path="",
        task=_task(capabilities),
        architecture=architecture or None,
        parameters=number(facts, "general.parameter_count") or None,
        size_bytes=number(tag, "size") or None,
        context_length=number(facts, f"{architecture}.context_length") or None,
        quantization=text_of(details, "quantization_level") or None,
        capabilities=capabilities,
        revision=text_of(tag, "digest"),
    )


def _capabilities(shown: Mapping[str, Any]) -> frozenset[Capability]:
    """What the server says; servers before 0.6.4 do not, and are taken for text models."""
    said = shown.get("capabilities")
    if not isinstance(said, list):
        return CAPABILITIES["completion"] | (CAPABILITIES["vision"] if shown.get("projector_info") else frozenset())
    return frozenset().union(*(CAPABILITIES.get(str(name), frozenset()) for name in said))


def _task(capabilities: frozenset[Capability]) -> Task:
    if Capability.VISION in capabilities:
        return Task.IMAGE_TEXT_TO_TEXT
    return Task.TEXT_GENERATION if Capability.CHAT in capabilities else Task.FEATURE_EXTRACTION
