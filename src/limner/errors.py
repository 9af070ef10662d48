"""The errors that Limner raises on purpose: one base class, one class for each kind of remedy.

Every message names the field, the value received, what is allowed and what to do. Knows nothing of HTTP or exit codes.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AccessDenied",
    "BudgetSpent",
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "Conflict",
    "DeadlineExceeded",
    "InvalidRequest",
    "LimnerError",
    "MissingExtra",
    "Moderated",
    "NotFound",
    "NumericalError",
    "OutputError",
    "QueueFull",
    "RateLimited",
    "RemoteError",
    "first_line",
]


class LimnerError(Exception):
    """Base of all errors that Limner raises on purpose. They can be pickled, and so reach other processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[LimnerError], args: tuple[object, ...]) -> LimnerError:
    """An error with its message, whatever its constructor asks for."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class InvalidRequest(LimnerError, ValueError):
    """A value of the request is not allowed: `field`, the value, what is allowed and a remedy are in the message."""

    def __init__(self, field: str, problem: str, *, code: str | None = None, index: int | None = None) -> None:
        """`code` is a word for programs, where they can remedy it; `index` says which value of a list it is, from 0."""
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem
        self.code = code
        self.index = index

    def of(self, field: str) -> InvalidRequest:
        """Return the error with another name for its field."""
        return InvalidRequest(field, self.problem, code=self.code, index=self.index)


class CheckpointError(LimnerError):
    """A model file or folder is missing, damaged or of another kind."""


class CapacityError(LimnerError):
    """The request is valid and does not fit in memory; the message has the numbers."""


class MissingExtra(LimnerError, ImportError):
    """A feature needs packages of an optional extra. The message has the command that installs them."""

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed; pip install 'limner[{extra}]'")


class NumericalError(LimnerError):
    """Values that are not finite came up, from damaged weights or too narrow a dtype."""


class OutputError(LimnerError):
    """A result could not be written; nothing half-written is left."""


class Cancelled(LimnerError):
    """Raise it in a step callback to stop the run. It reaches the caller, and no picture is made."""


class DeadlineExceeded(LimnerError):
    """A request was not finished within its time."""


class QueueFull(LimnerError):
    """The queue is full or closed. The same request may be sent again later."""


class Conflict(LimnerError):
    """The request contradicts what exists already."""


class AccessDenied(LimnerError):
    """The caller may not use the service. `missing`: no key was sent; otherwise the key is not valid."""

    def __init__(self, problem: str, *, missing: bool) -> None:
        super().__init__(problem)
        self.missing = missing


class RateLimited(LimnerError):
    """One caller sends too much at once; `retry_after` is in whole seconds, at least 1."""

    def __init__(self, problem: str, *, retry_after: int) -> None:
        super().__init__(f"{problem}; try again in {retry_after} s")
        self.retry_after = retry_after


class BudgetSpent(LimnerError):
    """The caller has used the granted budget. Waiting does not help; more has to be granted."""


class RemoteError(LimnerError):
    """Another machine gave no usable answer over the network. The same request may succeed later."""


class Moderated(LimnerError):
    """A safety check refuses the request or its result. The message repeats nothing of either."""


class NotFound(LimnerError):
    """The named thing does not exist, or not for this caller."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
