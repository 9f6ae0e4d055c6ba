"""OpenAI's protocol for vectors: ``POST /v1/embeddings`` (https://platform.openai.com/docs/api-reference/embeddings)."""

from __future__ import annotations

import base64
import secrets
import struct
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from serve_app.api.body import json_body
from serve_app.api.context import caller_of, trace_of
from serve_app.api.services import Services
from serve_app.api.validation import read
from serve_app.domain.catalog import Capability
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import InvalidInput
from serve_app.domain.generation import Priority
from serve_app.domain.routing import Ask

MOST_TEXTS = 2048


class EmbeddingsBody(BaseModel):
    """Fields that change nothing (``user``) are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None

    def texts(self) -> list[str]:
        """The texts to embed; InvalidInput for token ids (they belong to another tokenizer) and for too many."""
        given = [self.input] if isinstance(self.input, str) else self.input
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) < len(given):
            raise InvalidInput("input must be text: token ids mean something else to every model.")
        if len(texts) > MOST_TEXTS:
            raise InvalidInput(f"input holds {len(texts):,} texts; {MOST_TEXTS:,} is the most.")
        return texts


def embeddings_router(services: Services) -> APIRouter:
    """``/v1/embeddings``."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        trail = trace_of(request.scope)
        with trail.reading():
            body = read(EmbeddingsBody, await json_body(request))
            texts = tuple(body.texts())
        needs = frozenset({Capability.EMBEDDINGS})
        caller = caller_of(request) or "anonymous"
        ask = Ask(secrets.token_hex(16), body.model, needs, priority=Priority.NORMAL, caller=caller)
        wanted = EmbeddingRequest(ask.ticket, body.model, texts, body.encoding_format or "float", trail.carrier())
        found = await services.gateway.embed(ask, wanted, trail)
        return JSONResponse(_answer(body, found))

    return router


def _answer(body: EmbeddingsBody, found: Embeddings) -> dict[str, Any]:
    size = len(found.vectors[0])
    if body.dimensions not in (None, size):
        raise InvalidInput(f"The model's vectors have {size} dimensions; they cannot be cut to {body.dimensions}.")
    encode = _packed if body.encoding_format == "base64" else list
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(found.vectors)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
    }


def _packed(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
