"""The HTTP application: every surface over one set of services."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serve_app.api.body import BodyLimit, most_bytes
from serve_app.api.context import TOKEN_HEADER
from serve_app.api.embeddings import embeddings_router
from serve_app.api.errors import Boundary, install
from serve_app.api.gate import Gate
from serve_app.api.graphql import graphql_router
from serve_app.api.health import health_router
from serve_app.api.image_routes import images_router
from serve_app.api.models import models_router
from serve_app.api.ollama import ollama_router
from serve_app.api.openai import openai_router
from serve_app.api.rotation import rotation_router
from serve_app.api.services import Services
from serve_app.api.stream import stream_router
from serve_app.api.traced import Traced
from serve_app.api.traces import traces_router
from serve_app.config import Settings


def create_app(services: Services) -> FastAPI:
    """The application. It starts nothing: the composition root runs the sessions' loop and closes the services."""
    app = FastAPI(
        title="Rotunda",
        docs_url=None,  # both pages load their scripts from other sites
        redoc_url=None,
        openapi_url=None,
        middleware=_middleware(services),
    )
    install(app)
    for router in (
        health_router(services),
        stream_router(services),
        models_router(services),
        rotation_router(services),
        images_router(services),
        openai_router(services),
        ollama_router(services),
        embeddings_router(services),
        graphql_router(services),
        traces_router(services),
    ):
        app.include_router(router)
    return app


def _middleware(services: Services) -> list[Middleware]:
    """Outermost first. CORS stands outside the boundary, so that pages of allowed sites can read errors too."""
    settings = services.settings
    return [
        Middleware(Traced, tracing=services.tracing, trust=settings.trust_traceparent),
        *_cors(settings),
        Middleware(Boundary),
        Middleware(Gate, settings=settings, access=services.access),
        Middleware(BodyLimit, limit=most_bytes(settings)),
    ]


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID", TOKEN_HEADER],
            expose_headers=["x-trace-id", "server-timing", "retry-after"],
        )
    ]
