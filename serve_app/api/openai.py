"""OpenAI's protocol: ``/v1/models`` and ``/v1/chat/completions``. Nothing is stored; leaving cancels."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from serve_app.api.access import ANONYMOUS
from serve_app.api.body import json_body
from serve_app.api.context import caller_of, trace_of
from serve_app.api.errors import openai_json
from serve_app.api.models import find_model
from serve_app.api.openai_request import Chat, read_chat
from serve_app.api.services import Services
from serve_app.api.sse import EventStream, encode_json, until_disconnect
from serve_app.domain.errors import Internal, RotundaError
from serve_app.domain.fleet import ModelStatus
from serve_app.domain.generation import Delta, Usage
from serve_app.gateway import Completed, Routed, Step

logger = logging.getLogger(__name__)

OPENING_S = 2.0
"""How long the answer's status waits for the model's first word; then headers go out, before clients try again."""
DONE = b"data: [DONE]\n\n"


class Completions:
    """Chat completions over one ingress's services."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._heartbeat_s = services.settings.heartbeat_ms / 1000

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``, streamed or whole."""
        value = await json_body(request)
        caller = caller_of(request) or ANONYMOUS
        chat = await read_chat(value, self._services.intake, caller, trace_of(request.scope))
        steps = self._services.gateway.reply(chat.ask, chat.request)
        if not chat.stream:
            return JSONResponse(await _unless_disconnected(request, _whole(chat, steps)))
        opening = await _opening(steps)
        return EventStream(_chunks(chat, opening, steps, trace_of(request.scope).trace_id), self._heartbeat_s)


async def _unless_disconnected(request: Request, answer: Any) -> Any:
    """The answer, or ClientDisconnect after cancelling it."""
    loop = asyncio.get_running_loop()
    work = loop.create_task(answer)
    gone = loop.create_task(until_disconnect(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _whole(chat: Chat, steps: AsyncGenerator[Step, None]) -> dict[str, Any]:
    texts: list[str] = []
    completed: Completed | None = None
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, Delta):
                texts.append(step.text)
            elif isinstance(step, Completed):
                completed = step
    assert completed is not None
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
        "logprobs": None,
        "finish_reason": completed.finish.reason.value,
    }
    return {**_head(chat, "chat.completion"), "choices": [choice], "usage": usage_json(completed.finish.usage)}


def _head(chat: Chat, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{chat.request.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": chat.model,
        "system_fingerprint": None,
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


async def _opening(steps: AsyncGenerator[Step, None]) -> asyncio.Task[Step]:
    """Wait until the status is known: the first step after the route, its failure (raised here), or too long a time."""
    loop = asyncio.get_running_loop()
    first = loop.create_task(_first_word(steps))
    try:
        await asyncio.wait((first,), timeout=OPENING_S)
        if first.done():
            first.result()
    except BaseException:
        async with _ended(first):
            pass
        await steps.aclose()
        raise
    return first


async def _first_word(steps: AsyncGenerator[Step, None]) -> Step:
    """A model that waits or loads says so at once; a resident one accepts or refuses the prompt."""
    while isinstance(step := await anext(steps), Routed):
        pass
    return step


async def _chunks(
    chat: Chat, opening: asyncio.Task[Step], steps: AsyncGenerator[Step, None], trace_id: str
) -> AsyncGenerator[bytes, None]:
    """The chunks of a streamed answer. It always ends with ``[DONE]``, after an error too."""
    head = _head(chat, "chat.completion.chunk")
    if chat.include_usage:
        head["usage"] = None
    try:
        async with aclosing(steps), _ended(opening):
            yield _data({**head, "choices": [_choice({"role": "assistant", "content": ""})]})
            async for step in _from(opening, steps):
                for payload in _payloads(step, head, chat.include_usage):
                    yield _data(payload)
    except RotundaError as error:
        yield _data(openai_json(error))
    except Exception:
        logger.exception("a completion failed (trace %s)", trace_id)
        yield _data(openai_json(Internal.masked()))
    yield DONE


@asynccontextmanager
async def _ended(task: asyncio.Task[Any]) -> AsyncIterator[None]:
    """A generator cannot be closed while somebody waits for its next item: see to it that nobody does."""
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _from(opening: asyncio.Task[Step], steps: AsyncGenerator[Step, None]) -> AsyncGenerator[Step, None]:
    yield await opening
    async for step in steps:
        yield step


def _payloads(step: Step, head: Mapping[str, Any], include_usage: bool) -> list[dict[str, Any]]:
    if isinstance(step, Delta):
        return [{**head, "choices": [_choice({"content": step.text})]}]
    if not isinstance(step, Completed):
        return []
    last = {**head, "choices": [_choice({}, step.finish.reason.value)]}
    if not include_usage:
        return [last]
    return [last, {**head, "choices": [], "usage": usage_json(step.finish.usage)}]


def _choice(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _data(payload: Mapping[str, Any]) -> bytes:
    return f"data: {encode_json(payload)}\n\n".encode()


def _model_json(status: ModelStatus) -> dict[str, Any]:
    return {"id": status.name, "object": "model", "created": 0, "owned_by": status.entry.provider}


def openai_router(services: Services) -> APIRouter:
    """``/v1/models`` and ``/v1/chat/completions``."""
    router, completions = APIRouter(), Completions(services)

    @router.get("/v1/models")
    async def models() -> Response:
        view = await services.gateway.router.view()
        return JSONResponse({"object": "list", "data": [_model_json(status) for status in view.models]})

    @router.get("/v1/models/{id:path}")
    async def model(id: str) -> Response:
        return JSONResponse(_model_json(find_model(await services.gateway.router.view(), id)))

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await completions.chat(request)

    return router
