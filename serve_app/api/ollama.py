"""Ollama's protocol, for clients that speak no other: ``/api/chat``, ``/api/generate``, ``/api/embed``, ``/api/tags``,
``/api/ps``, ``/api/show``, ``/api/version``, ``/api/pull``, ``/api/delete``.

Nothing is stored; leaving cancels. An empty prompt loads a model, with ``keep_alive: 0`` it makes it leave; how long a
model stays otherwise is the rotation's decision. ``pull`` and ``delete`` take a model into the pool and out of it: its
files belong to the operator (``rotunda pull``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse, PlainTextResponse

from serve_app.api.access import ANONYMOUS
from serve_app.api.choices import Choices, Numbered, ended, first_word, going_on, together, unless_disconnected
from serve_app.api.context import caller_of, trace_of
from serve_app.api.models import find_model
from serve_app.api.ollama_request import (
    Asked,
    ChatBody,
    EmbedBody,
    GenerateBody,
    Named,
    Order,
    body_of,
    chat_order,
    generate_order,
)
from serve_app.api.ollama_shape import Shape, line, nanoseconds, running, shown, tag
from serve_app.api.services import Services
from serve_app.api.sse import EventStream
from serve_app.api.validation import parse_json
from serve_app.domain.catalog import Capability
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import Internal, InvalidInput, ModelNotFound, RotundaError
from serve_app.domain.generation import Delta, Priority
from serve_app.domain.routing import Ask
from serve_app.gateway import Completed, Step

logger = logging.getLogger(__name__)

LATEST = ":latest"
"""What some clients add to a name without a tag."""
MOST_TEXTS = 2048


class Lines(EventStream):
    """A stream of NDJSON. Its clients take neither blank lines nor comments: silence is filled with an empty piece."""

    media_type = "application/x-ndjson"


class Ollama:
    """The endpoints over one ingress's services."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._heartbeat_s = services.settings.heartbeat_ms / 1000

    async def chat(self, request: Request) -> Response:
        trail, caller = trace_of(request.scope), caller_of(request) or ANONYMOUS
        with trail.reading():
            body: ChatBody = await self._known(body_of(ChatBody, await _json(request)))
            order = await chat_order(body, self._services.intake, caller, trail) if body.messages else None
        return await self._answer(request, body, order, Shape("chat", body.wanted, body.think is not False))

    async def generate(self, request: Request) -> Response:
        trail, caller = trace_of(request.scope), caller_of(request) or ANONYMOUS
        with trail.reading():
            body: GenerateBody = await self._known(body_of(GenerateBody, await _json(request)))
            asked = body.prompt or body.images
            order = await generate_order(body, self._services.intake, caller, trail) if asked else None
        return await self._answer(request, body, order, Shape("generate", body.wanted, body.think is not False))

    async def _answer(self, request: Request, body: Asked, order: Order | None, shape: Shape) -> Response:
        if order is None:
            action = "unload" if body.leaves else "load"
            await self._services.gateway.router.command(action, body.wanted)
            return JSONResponse(shape.done(action))
        gateway, trail = self._services.gateway, trace_of(request.scope)
        steps = gateway.reply(order.ask, order.request, trail=trail)
        if not order.stream:
            return JSONResponse(await unless_disconnected(request, _whole(shape, steps)))
        choices = together([steps])
        opening = await first_word(choices)
        chunks = _lines(shape, opening, choices, trail.trace_id)
        return Lines(chunks, self._heartbeat_s, ping=line(shape.empty()))

    async def _known(self, body: Any) -> Any:
        """The body with the model's name as the platform knows it."""
        name = body.wanted
        if name.endswith(LATEST):
            view = await self._services.gateway.router.view()
            try:
                find_model(view, name)
            except ModelNotFound:
                name = name.removesuffix(LATEST)
        return body.model_copy(update={"model": name})

    async def embed(self, request: Request) -> Response:
        """``POST /api/embed``: one vector for each text."""
        body: EmbedBody = await self._known(body_of(EmbedBody, await _json(request)))
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not texts:
            return JSONResponse({"model": body.wanted, "embeddings": []})
        found, seconds = await self._embedded(request, body.wanted, texts)
        return JSONResponse(
            {
                "model": body.wanted,
                "embeddings": [list(vector) for vector in found.vectors],
                "total_duration": nanoseconds(seconds),
                "load_duration": 0,
                "prompt_eval_count": found.prompt_tokens,
            }
        )

    async def embeddings(self, request: Request) -> Response:
        """``POST /api/embeddings``, as it was before ``/api/embed``: one text."""
        body: EmbedBody = await self._known(body_of(EmbedBody, await _json(request)))
        found, _ = await self._embedded(request, body.wanted, [body.prompt])
        return JSONResponse({"embedding": list(found.vectors[0])})

    async def _embedded(self, request: Request, model: str, texts: list[str]) -> tuple[Embeddings, float]:
        if len(texts) > MOST_TEXTS:
            raise InvalidInput(f"input holds {len(texts):,} texts; {MOST_TEXTS:,} is the most.")
        trail, began = trace_of(request.scope), asyncio.get_running_loop().time()
        needs, caller = frozenset({Capability.EMBEDDINGS}), caller_of(request) or ANONYMOUS
        ask = Ask(secrets.token_hex(16), model, needs, priority=Priority.NORMAL, caller=caller)
        wanted = EmbeddingRequest(ask.ticket, model, tuple(texts), "float", trail.carrier())
        found = await self._services.gateway.embed(ask, wanted, trail)
        return found, asyncio.get_running_loop().time() - began

    async def tags(self) -> Response:
        view = await self._services.gateway.router.view()
        return JSONResponse({"models": [tag(status) for status in view.models]})

    async def ps(self) -> Response:
        view = await self._services.gateway.router.view()
        return JSONResponse({"models": [running(status) for status in view.models if status.resident]})

    async def show(self, request: Request) -> Response:
        body: Named = await self._known(body_of(Named, await _json(request)))
        return JSONResponse(shown(find_model(await self._services.gateway.router.view(), body.wanted)))

    async def pull(self, request: Request) -> Response:
        """Take a model into the pool, whose files are here already; nothing is fetched at a client's wish."""
        body: Named = await self._known(body_of(Named, await _json(request)))
        await self._services.gateway.router.command("set_rotation", add=[body.wanted])
        if body.stream is False:
            return JSONResponse({"status": "success"})
        return Response(line({"status": "pulling manifest"}) + line({"status": "success"}), media_type=Lines.media_type)

    async def delete(self, request: Request) -> Response:
        """Take a model out of the pool; its files stay."""
        body: Named = await self._known(body_of(Named, await _json(request)))
        await self._services.gateway.router.command("set_rotation", remove=[body.wanted])
        return Response(status_code=200)


async def _json(request: Request) -> Any:
    """The body, whatever it is declared as: Ollama's own examples declare nothing."""
    return parse_json(await request.body())


async def _whole(shape: Shape, steps: AsyncGenerator[Step, None]) -> Mapping[str, Any]:
    deltas: list[Delta] = []
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, Delta):
                deltas.append(step)
            elif isinstance(step, Completed):
                return shape.whole(deltas, step)
    raise AssertionError("a reply ends with Completed, or raises")


async def _lines(
    shape: Shape, opening: asyncio.Task[Numbered], choices: Choices, trace_id: str
) -> AsyncGenerator[bytes, None]:
    """The lines of a streamed answer; an error after the first is a line as well."""
    try:
        async with aclosing(choices), ended(opening):
            async for _, step in going_on(opening, choices):
                if isinstance(step, Delta) and (said := shape.chunk(step)) is not None:
                    yield line(said)
                elif isinstance(step, Completed):
                    if (calls := shape.calls()) is not None:
                        yield line(calls)
                    yield line(shape.last(step))
    except RotundaError as error:
        yield line({"error": error.message})
    except Exception:
        logger.exception("a completion failed (trace %s)", trace_id)
        yield line({"error": Internal.masked().message})


def ollama_router(services: Services) -> APIRouter:
    """The routes of the module."""
    router, ollama = APIRouter(), Ollama(services)

    @router.get("/api/version")
    async def told_version() -> Response:
        return JSONResponse({"version": version("rotunda")})

    @router.api_route("/", methods=["GET", "HEAD"])
    async def root() -> Response:
        return PlainTextResponse("Rotunda is running")

    for path, method in {
        "chat": ollama.chat,
        "generate": ollama.generate,
        "embed": ollama.embed,
        "embeddings": ollama.embeddings,
        "show": ollama.show,
        "pull": ollama.pull,
    }.items():
        router.add_api_route(f"/api/{path}", method, methods=["POST"])
    router.add_api_route("/api/delete", ollama.delete, methods=["DELETE"])
    router.add_api_route("/api/tags", ollama.tags, methods=["GET", "HEAD"])
    router.add_api_route("/api/ps", ollama.ps, methods=["GET"])
    return router
