"""The errors that Limner raises on purpose: one base, one class for each kind of remedy.

Every message names the field, the value that came, what is allowed and what to do. Knows nothing of HTTP or exit codes.
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
    """Base of all errors that Limner raises on purpose. They reach other processes as they are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[LimnerError], args: tuple[object, ...]) -> LimnerError:
    """An error with its message, whatever its constructor asks for."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class InvalidRequest(LimnerError, ValueError):
    """A value of the request is not allowed: `field`, the value, what is allowed and a remedy are in the message."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class CheckpointError(LimnerError):
    """A model file or folder is missing, damaged or of another kind."""


class CapacityError(LimnerError):
    """The request is valid and does not fit in memory; the message has the numbers."""


class MissingExtra(LimnerError, ImportError):
    """What was asked for needs packages of an optional extra: the message has the command that installs them."""

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed; pip install 'limner[{extra}]'")


class NumericalError(LimnerError):
    """The arithmetic broke down: values that are not finite, from damaged weights or too narrow a dtype."""


class OutputError(LimnerError):
    """A result could not be written; nothing half-written is left."""


class Cancelled(LimnerError):
    """Raise it in a step callback to stop the run: it reaches the caller, and no picture is made."""


class DeadlineExceeded(LimnerError):
    """A request was not done within the time that it was given."""


class QueueFull(LimnerError):
    """As many requests wait as may, or no more are taken; the same request may be sent again later."""


class Conflict(LimnerError):
    """The request contradicts what is there already."""


class AccessDenied(LimnerError):
    """The caller may not use the service. `missing`: no key came at all; otherwise the one that came is not valid."""

    def __init__(self, problem: str, *, missing: bool) -> None:
        super().__init__(problem)
        self.missing = missing


class RateLimited(LimnerError):
    """Too much at once from one caller; `retry_after` is in whole seconds, at least 1."""

    def __init__(self, problem: str, *, retry_after: int) -> None:
        super().__init__(f"{problem}; try again in {retry_after} s")
        self.retry_after = retry_after


class BudgetSpent(LimnerError):
    """The caller has had as much as was granted; waiting does not help, more has to be granted."""


class RemoteError(LimnerError):
    """Another machine that was asked over the network gave no usable answer; the same request may succeed later."""


class Moderated(LimnerError):
    """A safety check refuses the request or its result; the message repeats nothing of either."""


class NotFound(LimnerError):
    """What was named is not here, or not for this caller."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
