"""Bodies on the wire: strict JSON and forms in, safe JSON out. Knows no schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from limner.errors import InvalidRequest

__all__ = ["SafeJSON", "StrictRoute", "check_form"]

_MAX_PARTS = 100_000
"""Most brackets, braces and commas in a JSON body. Pictures have none, a prompt of 32,000 characters has few."""


class SafeJSON(JSONResponse):
    """JSON in ASCII, so that a lone surrogate, which JSON allows and UTF-8 does not, goes back as it came."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


class StrictRoute(APIRoute):
    """Routes whose JSON bodies mean the same to every parser: UTF-8, no name twice, no NaN, a limited number of parts."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            parts = sum(map(body.count, (b"[", b"{", b",")))
            if parts > _MAX_PARTS:  # a parsed part takes many times its size in memory
                raise HTTPException(400, f"body: has {parts} lists, objects and values; {_MAX_PARTS} are allowed")
            try:
                self._json = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
            except json.JSONDecodeError:
                raise
            except RecursionError:
                raise HTTPException(400, "body: is nested too deeply") from None
            except ValueError as error:
                raise HTTPException(400, f"body: {error}") from None
        return self._json


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if any(name == other for other, _ in pairs[:i]))
        raise ValueError(f"the name {twice[:80]!r} is there twice; give it once")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON; give a number")


def check_form(request: Request) -> None:
    """Raise `InvalidRequest` unless the body is a form in UTF-8; other codecs may fail, or compute for long."""
    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    if kind != b"multipart/form-data":
        raise InvalidRequest("body", f"{kind.decode('latin-1')[:80]!r} is not multipart/form-data")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise InvalidRequest("body", f"the charset {charset.decode('latin-1')[:80]!r} is not read; send UTF-8")
