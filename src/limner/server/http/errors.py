"""Errors as HTTP answers: the one table of errors to statuses, and the body of an error in each dialect."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

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

__all__ = ["ERRORS", "INTERNAL", "OPENAI_ERRORS", "STATUSES", "answer_of", "error_body", "is_openai", "renamed"]

_logger = logging.getLogger("limner.server")
INTERNAL = "an error inside the server; its log has more"


class Problem(BaseModel):
    """One error. `loc` ends with the number of a picture, from 0, where its field has several.

    `type` is "transparent" for a picture that needs `background`, "size" for a mask that is not of its picture's size.
    """

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
"""Errors to statuses: the first match counts; other errors are 500."""
_CODES: tuple[tuple[type[LimnerError], str], ...] = (
    (Moderated, "moderation_blocked"),
    (Cancelled, "cancelled"),
    (BudgetSpent, "insufficient_quota"),
)
_IN_OPENAI = {402: 429, 403: 401, 422: 400}
_OURS = (OutputError, CheckpointError, MissingExtra)
"""Faults of the server, whose messages name its folders."""
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}


def is_openai(path: str) -> bool:
    """Return whether a path belongs to the OpenAI dialect; all others answer as the hosted dialect does."""
    return path.startswith(("/v1/images/", "/v1/models"))


def error_body(
    path: str, status: int, message: str, *, field: str | None = None, code: str | None = None, index: int | None = None
) -> dict[str, Any]:
    """Return the body of an error in the dialect of a path. `index` says which value of a field that has several."""
    if is_openai(path):
        kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": field, "code": code}}
    place = [] if field is None else ["body", field] if index is None else ["body", field, index]
    return {"detail": [{"loc": place, "msg": message, "type": code or f"http_{status}"}]}


def answer_of(path: str, error: LimnerError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers of an error in the dialect of a path. Faults of the server are logged."""
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
    code = next((code for kind, code in _CODES if isinstance(error, kind)), getattr(error, "code", None))
    field, index = getattr(error, "field", None), getattr(error, "index", None)
    return status, error_body(path, status, message, field=field, code=code, index=index), headers


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Return an error that names the field which the caller used, where a dialect has another name for it."""
    name = names.get(error.field)
    return error if name is None else error.of(name)
