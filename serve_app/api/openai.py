"""OpenAI's protocol: ``/v1/models``, ``/v1/chat/completions``, ``/v1/completions``. Nothing is stored; leaving cancels.

Several choices are several generations at once, which share their prompt. When one of them fails the answer fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from serve_app.api.access import ANONYMOUS
from serve_app.api.body import json_body
from serve_app.api.choices import Choices, Numbered, ended, first_word, going_on, together, unless_disconnected
from serve_app.api.context import caller_of, trace_of
from serve_app.api.errors import openai_json
from serve_app.api.models import find_model
from serve_app.api.openai_request import Order, in_snake_case, named_as_here, read_chat
from serve_app.api.openai_shape import ChatShape, Shape, head, total, usage_json
from serve_app.api.openai_text import TextShape, read_completion
from serve_app.api.services import Services
from serve_app.api.sse import EventStream, encode_json
from serve_app.domain.errors import Internal, InvalidInput, RotundaError
from serve_app.domain.fleet import ModelStatus
from serve_app.domain.generation import Delta, Finish, Usage
from serve_app.gateway import Completed

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class Completions:
    """Completions over one ingress's services."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._heartbeat_s = services.settings.heartbeat_ms / 1000

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``, streamed or whole."""
        trail, caller = trace_of(request.scope), caller_of(request) or ANONYMOUS
        with trail.reading():
            order = await read_chat(await json_body(request), self._services.intake, caller, trail)
        return await self._answer(request, order, ChatShape())

    async def text(self, request: Request) -> Response:
        """``POST /v1/completions``, streamed or whole."""
        trail, caller = trace_of(request.scope), caller_of(request) or ANONYMOUS
        with trail.reading():
            order = read_completion(await json_body(request), caller, trail)
        return await self._answer(request, order, TextShape())

    async def _answer(self, request: Request, order: Order, shape: Shape) -> Response:
        gateway, trail = self._services.gateway, trace_of(request.scope)
        choices = together([gateway.reply(order.ask(wanted), wanted, trail=trail) for wanted in order.requests])
        with named_as_here():
            if not order.stream:
                return JSONResponse(await unless_disconnected(request, _whole(order, shape, choices)))
            opening = await first_word(choices)
        return EventStream(_chunks(order, shape, opening, choices, trail.trace_id), self._heartbeat_s)


async def _whole(order: Order, shape: Shape, choices: Choices) -> dict[str, Any]:
    count = len(order.requests)
    deltas: list[list[Delta]] = [[] for _ in range(count)]
    finishes: dict[int, Finish] = {}
    async with aclosing(choices):
        async for index, step in choices:
            if isinstance(step, Delta):
                deltas[index].append(step)
            elif isinstance(step, Completed):
                finishes[index] = step.finish
    made = [shape.whole(index, Delta.joined(deltas[index]), finishes[index]) for index in range(count)]
    usage = total([finishes[index].usage for index in range(count)], order.choices)
    return {**head(order, shape, shape.whole_kind), "choices": made, "usage": usage_json(usage)}


async def _chunks(
    order: Order, shape: Shape, opening: asyncio.Task[Numbered], choices: Choices, trace_id: str
) -> AsyncGenerator[bytes, None]:
    """The chunks of a streamed answer. It always ends with ``[DONE]``, after an error too."""
    begin = head(order, shape, shape.chunk_kind)
    if order.include_usage:
        begin["usage"] = None
    usages: dict[int, Usage] = {}
    try:
        async with aclosing(choices), ended(opening):
            for index in range(len(order.requests)):
                if (first := shape.first(index)) is not None:
                    yield _data({**begin, "choices": [first]})
            async for index, step in going_on(opening, choices):
                if isinstance(step, Delta) and (chunk := shape.chunk(index, step)) is not None:
                    yield _data({**begin, "choices": [chunk]})
                elif isinstance(step, Completed):
                    usages[index] = step.finish.usage
                    yield _data({**begin, "choices": [shape.last(index, step.finish)]})
        if order.include_usage:
            usage = total([usages[index] for index in sorted(usages)], order.choices)
            yield _data({**begin, "choices": [], "usage": usage_json(usage)})
    except RotundaError as error:
        yield _data(openai_json(in_snake_case(error) if isinstance(error, InvalidInput) else error, trace_id))
    except Exception:
        logger.exception("a completion failed (trace %s)", trace_id)
        yield _data(openai_json(Internal.masked(), trace_id))
    yield DONE


def _data(payload: Mapping[str, Any]) -> bytes:
    return f"data: {encode_json(payload)}\n\n".encode()


def _model_json(status: ModelStatus) -> dict[str, Any]:
    return {"id": status.name, "object": "model", "created": 0, "owned_by": status.entry.provider}


def openai_router(services: Services) -> APIRouter:
    """The routes of the module."""
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

    @router.post("/v1/completions")
    async def text(request: Request) -> Response:
        return await completions.text(request)

    return router
