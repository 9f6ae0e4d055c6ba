"""Whether the server lives (``/health``) and whether it can serve (``/ready``)."""

from __future__ import annotations

from fastapi import APIRouter, Response
from starlette.responses import JSONResponse

from serve_app.api.services import Services


def health_router(services: Services) -> APIRouter:
    """Liveness asks nothing of anybody, so that a slow database does not get the server killed."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        reasons = await services.problems()
        return JSONResponse(
            {"status": "not ready" if reasons else "ready", "reasons": reasons}, status_code=503 if reasons else 200
        )

    return router
