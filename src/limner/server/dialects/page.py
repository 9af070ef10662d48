"""The page at /: static files and sample pictures, all shipped with the package."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from limner.errors import NotFound
from limner.server.http.service import Service

__all__ = ["routes"]

_FILES = Path(__file__).parent / "static"
_SAMPLES = Path(__file__).parents[2] / "assets" / "samples"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes(service: Service) -> APIRouter:
    """Return the routes of the page and its files, none of which needs a key."""
    router = APIRouter(include_in_schema=False)
    known = {file.name: file for file in _FILES.glob("*") if file.suffix in _TYPES}

    @router.get("/")
    async def index() -> Response:
        return _file(known, "index.html")

    samples = {file.name: file for file in _SAMPLES.glob("*.png")}

    @router.get("/static/samples/{name}")
    async def sample(name: str) -> Response:
        return _file(samples, name)

    @router.get("/static/{name}")
    async def file(name: str) -> Response:
        return _file(known, name)

    return router


def _file(known: dict[str, Path], name: str) -> Response:
    if name not in known:
        raise NotFound(f"{name[:80]!r} is not a file of the page")
    return FileResponse(known[name], media_type=_TYPES[known[name].suffix], headers=_HEADERS)
