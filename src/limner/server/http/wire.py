"""What the dialects share on the wire: errors, what is told of kept references, strict JSON in, safe JSON out.

Owns the one table of errors to HTTP statuses.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from limner.errors import (
    AccessDenied,
    BudgetSpent,
    Cancelled,
    CapacityError,
    CheckpointError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LimnerError,
    MissingExtra,
    Moderated,
    NotFound,
    OutputError,
    QueueFull,
    RateLimited,
    RemoteError,
)
from limner.server.jobs.records import Job

__all__ = [
    "ERRORS",
    "OPENAI_ERRORS",
    "SafeJSON",
    "StrictRoute",
    "answer_of",
    "cache_report",
    "check_form",
    "error_body",
    "is_openai",
]

_logger = logging.getLogger("limner.server")
_MAX_PARTS = 100_000
"""Of a JSON body: brackets, braces and commas, of which pictures have none and a prompt of 32,000 characters few."""
INTERNAL = "an error inside the server; its log has more"


class SafeJSON(JSONResponse):
    """JSON in ASCII: a lone surrogate, which JSON may hold and UTF-8 may not, goes back as it came."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


class StrictRoute(APIRoute):
    """Routes whose JSON bodies mean the same to every reader: UTF-8, no name twice, no NaN, not more parts than fit."""

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
            if parts > _MAX_PARTS:  # each takes many times its size in memory
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
    """Raises `InvalidRequest` unless the body is a form of UTF-8: other codecs may fail, or compute for long."""
    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    if kind != b"multipart/form-data":
        raise InvalidRequest("body", f"{kind.decode('latin-1')[:80]!r} is not multipart/form-data")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise InvalidRequest("body", f"the charset {charset.decode('latin-1')[:80]!r} is not read; send UTF-8")


class Problem(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class Problems(BaseModel):
    """Errors of the hosted dialect."""

    detail: list[Problem]


class OpenAIProblem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIProblems(BaseModel):
    """Errors of the OpenAI dialect."""

    error: OpenAIProblem


_MEANINGS = {
    400: "The body cannot be read",
    401: "No valid key",
    402: "The budget of the key is spent",
    403: "No valid key, or not allowed",
    404: "Not here, or not yours",
    405: "Another method",
    408: "The body did not come in time",
    409: "An idempotency key was used for another request",
    413: "The body is too large",
    422: "A field is not allowed",
    429: "Too much at once; see Retry-After",
    500: "An error of the server",
    503: "Too much waits, or the server shuts down; see Retry-After",
    504: "Not done in time",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problems, "description": meaning}
    for status, meaning in _MEANINGS.items()
    if status not in (401, 504)
}
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIProblems, "description": meaning}
    for status, meaning in _MEANINGS.items()
    if status not in (402, 403, 422)
}
STATUSES: tuple[tuple[type[LimnerError], int], ...] = (
    (AccessDenied, 403),
    (BudgetSpent, 402),
    (RateLimited, 429),
    (QueueFull, 503),
    (NotFound, 404),
    (Conflict, 409),
    (Cancelled, 409),
    (DeadlineExceeded, 504),
    (Moderated, 422),
    (InvalidRequest, 422),
    (CapacityError, 422),
    (RemoteError, 422),
    (OutputError, 503),
)
"""Which status an error becomes; the first match counts, and what is not here is 500."""
_CODES: tuple[tuple[type[LimnerError], str], ...] = (
    (Moderated, "moderation_blocked"),
    (Cancelled, "cancelled"),
    (BudgetSpent, "insufficient_quota"),
)
_IN_OPENAI = {402: 429, 403: 401, 422: 400}
_OURS = (OutputError, CheckpointError, MissingExtra)
"""Their messages name folders of the server."""
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}


def is_openai(path: str) -> bool:
    return path.startswith(("/v1/images/", "/v1/models"))


def error_body(
    path: str, status: int, message: str, *, field: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in the dialect of a path."""
    if is_openai(path):
        kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": field, "code": code}}
    return {"detail": [{"loc": ["body", field] if field else [], "msg": message, "type": code or f"http_{status}"}]}


def answer_of(path: str, error: LimnerError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error in the dialect of a path; what is a fault of the server is logged."""
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    if is_openai(path):
        status = _IN_OPENAI.get(status, status)
    message = str(error)
    if status == 500 or isinstance(error, _OURS):
        _logger.error("%s failed", path, exc_info=error)
        message = INTERNAL if isinstance(error, _OURS) else message
    headers = {}
    if isinstance(error, RateLimited):
        headers["retry-after"] = str(error.retry_after)
    elif status == 503:
        headers["retry-after"] = "5"
    elif isinstance(error, AccessDenied):
        headers["www-authenticate"] = "Bearer"
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    return status, error_body(path, status, message, field=getattr(error, "field", None), code=code), headers


def cache_report(job: Job) -> dict[str, Any]:
    """Whether the references of a job were kept already, and what that saved."""
    told = job.result
    names = (
        "reference_cache",
        "reference_key",
        "seconds_saved",
        "references",
        "prompt",
        "timings",
        "waited",
        "ran",
        "batch",
        "encode_seconds",
    )
    return {name: told[name] for name in names if name in told}
