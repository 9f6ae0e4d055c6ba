"""GraphiQL, served from here: a browser that opens ``/graphql`` needs no other site (see ``ide/LICENSES.md``)."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import FileResponse, Response

from serve_app.domain.errors import NotFound

FOLDER = Path(__file__).with_name("ide")
PAGE = "index.html"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
ASSETS = frozenset(path.name for path in FOLDER.iterdir() if path.suffix in TYPES and path.name != PAGE)
# GraphiQL sets styles from scripts, and carries its fonts and some of its icons in its style sheet.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src data:; img-src 'self' data:; "
    "connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page() -> Response:
    return _file(PAGE, "no-cache")


def asset(name: str) -> Response:
    """A script or style sheet of the page. Raises NotFound for any other name."""
    if name not in ASSETS:
        raise NotFound("The GraphQL page has no such file.")
    return _file(name, "max-age=86400")


def _file(name: str, cache: str) -> Response:
    path = FOLDER / name
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": cache}
    return FileResponse(path, headers=headers, media_type=TYPES[path.suffix])
