"""The rotation over HTTP: what holds memory and why, and the commands that change it for all models at once."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from serve_app.api.body import json_body
from serve_app.api.services import Services
from serve_app.api.validation import StrictModel, read
from serve_app.domain.errors import InvalidInput
from serve_app.domain.rotation_view import HISTORY

MOST_DECISIONS = 500


class PoolChange(StrictModel):
    """The body of ``POST /api/rotation``: names of models to take into the pool, or out of it."""

    add: list[str] = Field(default_factory=list)
    remove: list[str] = Field(default_factory=list)


def rotation_router(services: Services) -> APIRouter:
    """``/api/rotation`` and below."""
    router, fleet = APIRouter(), services.gateway.router

    @router.get("/api/rotation")
    async def rotation(request: Request) -> Response:
        return JSONResponse((await fleet.rotation(_history(request))).to_json())

    @router.post("/api/rotation")
    async def set_rotation(request: Request) -> Response:
        change = read(PoolChange, await json_body(request))
        return JSONResponse(await fleet.command("set_rotation", add=change.add, remove=change.remove))

    @router.post("/api/rotation/cleanup")
    async def cleanup() -> Response:
        return JSONResponse(await fleet.command("emergency_cleanup"))

    return router


def _history(request: Request) -> int:
    """How many of the last decisions are wanted: ``?history=``."""
    given = request.query_params.get("history", str(HISTORY))
    if not (given.isascii() and given.isdecimal() and len(given) < 6 and int(given) <= MOST_DECISIONS):
        raise InvalidInput(f"history must be a number from 0 to {MOST_DECISIONS}.")
    return int(given)
