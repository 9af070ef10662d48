"""Bodies on the wire: strict JSON and forms in, safe JSON out. Knows no schema.

Large bodies are read in threads, so that no body holds up the event loop and with it all other callers.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from limner.errors import InvalidRequest, QueueFull
from limner.server.http.json_body import read_json

__all__ = ["SafeJSON", "StrictRoute", "read_form"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_SMALL = 64 << 10
"""Bodies of fewer bytes are read in the event loop: it takes less than going to a thread and back."""
_SLICE = 64 << 10


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
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            chunks = [chunk async for chunk in self.stream() if chunk]
            self._body = b"".join(chunks)  # which copies nothing if there is one
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            max_text = 2 * self.app.state.service.settings.max_picture_bytes  # base64, line breaks, escaped slashes
            try:
                self._json = await _read(self, len(body), read_json, body, max_text=max_text)
            except InvalidRequest as error:
                raise HTTPException(400, str(error)) from None
            except QueueFull as error:  # FastAPI makes a 400 of other errors here
                raise HTTPException(503, str(error), headers={"retry-after": "5"}) from None
        return self._json


@contextlib.asynccontextmanager
async def read_form(request: Request, *, max_fields: int, max_part: int) -> AsyncIterator[FormData]:
    """Read a form in UTF-8 of at most 20 files, `max_fields` fields and `max_part` bytes in a part, for the block.

    Raises `InvalidRequest` for other bodies.
    """
    _check_form(request)
    body = await request.body()
    try:
        form = await _read(request, len(body), _parse_form, request.headers, body, max_fields, max_part)
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    try:
        yield form
    finally:
        await form.close()


async def _read(request: Request, num_bytes: int, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Make a call that takes as long as a body is large. Owners share the threads for it."""
    if num_bytes <= _SMALL:
        return call(*args, **kwargs)
    offload, owner = request.app.state.service.offload, request.state.owner
    return cast(_R, await offload.decode(functools.partial(call, *args, **kwargs), field="body", owner=owner.id))


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # in memory, as the body is: no file, so no lack of files, room or folder


def _parse_form(headers: Headers, body: bytes, max_fields: int, max_part: int) -> FormData:
    """Parse a form to its end. The parser waits for nothing but the body, which is here."""
    parser = _InMemory(headers, _slices(body), max_files=20, max_fields=max_fields, max_part_size=max_part)
    steps = parser.parse()
    try:
        steps.send(None)
    except StopIteration as end:
        form: FormData = end.value
        return form
    raise AssertionError("the parser waits for something")


async def _slices(body: bytes) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(body), _SLICE):
        yield body[at : at + _SLICE]


def _check_form(request: Request) -> None:
    """Raise `InvalidRequest` unless the body is a form in UTF-8; other codecs may fail, or compute for long."""
    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    if kind != b"multipart/form-data":
        raise InvalidRequest("body", f"{kind.decode('latin-1')[:80]!r} is not multipart/form-data")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise InvalidRequest("body", f"the charset {charset.decode('latin-1')[:80]!r} is not read; send UTF-8")
