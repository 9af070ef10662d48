"""What the schemas of both dialects share: documented errors, what is told of kept references, JSON that always encodes."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from limner.server.jobs import Job

__all__ = ["ERRORS", "OPENAI_ERRORS", "SafeJSON", "cache_report", "error_body"]


class SafeJSON(Response):
    """JSON in ASCII: a lone surrogate, which JSON may hold and UTF-8 may not, goes back as it came."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


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
    status: {"model": OpenAIProblems, "description": meaning} for status, meaning in _MEANINGS.items() if status != 403
}
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


def cache_report(job: Job) -> dict[str, Any]:
    """Whether the references of a job were kept already, and what that saved."""
    told = job.result
    names = (
        "reference_cache", "reference_key", "seconds_saved", "references", "prompt", "timings", "waited", "ran", "batch",
        "encode_seconds",
    )  # fmt: skip
    return {name: told[name] for name in names if name in told}
