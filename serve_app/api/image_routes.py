"""Images on their way out: ``GET /api/images/{id}``."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from serve_app.api.context import address_of, token_of
from serve_app.api.services import Services


def images_router(services: Services) -> APIRouter:
    """``GET /api/images/{id}``."""
    router = APIRouter()

    @router.get("/api/images/{id}")
    async def image(id: str, request: Request) -> Response:
        found = await services.access.image(id, token=token_of(request), address=address_of(request))
        data = await services.files.read(found.file_path)
        headers = {
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(found.filename, safe='')}",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cache-Control": "private, max-age=3600",
        }
        return Response(data, media_type=found.mime_type, headers=headers)

    return router
