"""What the platform tells of itself: recorded traces (``/traces``, ``/traces/{id}``) and figures (``/metrics``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from serve_app.api.services import Services
from serve_app.domain.errors import InvalidInput, NotFound
from serve_app.telemetry.formats import as_otlp, as_perfetto, as_tree
from serve_app.telemetry.metrics import CONTENT_TYPE
from serve_app.telemetry.spans import SpanRow

MOST_TRACES = 1000
FORMATS: dict[str, Callable[[Sequence[SpanRow]], dict[str, Any]]] = {
    "json": as_tree,
    "otlp": as_otlp,
    "perfetto": as_perfetto,
}


class Traces:
    """The traces that the router keeps."""

    def __init__(self, services: Services) -> None:
        self._kept = services.kept

    async def list(self, request: Request) -> Response:
        """``GET /traces?limit=50&session=…``: newest first."""
        limit = _number(request.query_params.get("limit", "50"))
        found = await self._kept.traces(limit, request.query_params.get("session")) if self._kept else None
        if found is None:
            raise _elsewhere()
        return JSONResponse({"traces": found})

    async def one(self, id: str, request: Request) -> Response:
        """``GET /traces/{id}?format=json|otlp|perfetto``."""
        wanted = request.query_params.get("format", "json")
        if wanted not in FORMATS:
            raise InvalidInput(f"format must be one of {', '.join(FORMATS)}.")
        rows = await self._kept.trace(id.lower()) if self._kept else None
        if rows is None:
            raise _elsewhere()
        if not rows:
            raise NotFound(
                "There is no trace with this id. It may not have been sampled, its time may be over, or its spans are "
                "on their way: they arrive a second or two after they end."
            )
        return JSONResponse(FORMATS[wanted](rows))

    async def figures(self) -> Response:
        """``GET /metrics``: the figures of all processes of the cluster, whichever ingress is asked."""
        if self._kept is None:
            raise NotFound("There are no figures here: this server runs without a router.")
        return Response(await self._kept.figures(), media_type=CONTENT_TYPE)


def _elsewhere() -> NotFound:
    return NotFound("No traces are kept here: they are switched off, or exported (OTEL_EXPORTER_OTLP_ENDPOINT).")


def _number(given: str) -> int:
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= MOST_TRACES):
        raise InvalidInput(f"limit must be a number from 1 to {MOST_TRACES:,}.")
    return int(given)


def traces_router(services: Services) -> APIRouter:
    """The routes of the module."""
    router, traces = APIRouter(), Traces(services)

    @router.get("/metrics")
    async def metrics() -> Response:
        return await traces.figures()

    @router.get("/traces")
    async def listed(request: Request) -> Response:
        return await traces.list(request)

    @router.get("/traces/{id}")
    async def one(id: str, request: Request) -> Response:
        return await traces.one(id, request)

    return router
