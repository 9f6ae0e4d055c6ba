"""The models over HTTP: what there is, and the commands to the router. Ids may hold ``/`` and ``:``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from serve_app.api.body import json_body
from serve_app.api.services import Services
from serve_app.api.validation import StrictModel, read
from serve_app.domain.catalog import Catalogue
from serve_app.domain.fleet import FleetView, ModelStatus


class Pin(StrictModel):
    """The body of ``POST /api/models/{id}/pin``; without one the model is pinned."""

    pinned: bool = True


def find_model(view: FleetView, name: str) -> ModelStatus:
    """The model that ``name`` means, by its id, its full name or the name that the view gives it.

    Raises:
        ModelNotFound, ModelAmbiguous: as :meth:`Catalogue.resolve`.
    """
    named = next((status for status in view.models if status.name == name), None)
    if named is not None:
        return named
    entry = Catalogue(status.entry for status in view.models).resolve(name)
    return next(status for status in view.models if status.entry is entry)


def models_router(services: Services) -> APIRouter:
    """``/api/models`` and below. Routes with an action come first: the bare id would swallow them."""
    router, fleet = APIRouter(), services.gateway.router

    @router.get("/api/models")
    async def models() -> Response:
        return JSONResponse((await fleet.view()).to_json())

    @router.get("/api/models/{id:path}/plan")
    async def plan(id: str) -> Response:
        return JSONResponse(await fleet.command("plan", id))

    @router.get("/api/models/{id:path}")
    async def model(id: str) -> Response:
        return JSONResponse(find_model(await fleet.view(), id).to_json())

    @router.post("/api/models/{id:path}/load")
    async def load(id: str) -> Response:
        return JSONResponse(await fleet.command("load", id))

    @router.post("/api/models/{id:path}/unload")
    async def unload(id: str) -> Response:
        return JSONResponse(await fleet.command("unload", id))

    @router.post("/api/models/{id:path}/pin")
    async def pin(id: str, request: Request) -> Response:
        body = read(Pin, await json_body(request) if await request.body() else {})
        return JSONResponse(await fleet.command("pin", id, pinned=body.pinned))

    return router
