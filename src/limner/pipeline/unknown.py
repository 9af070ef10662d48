"""Arguments that a function does not have: an error that suggests the right one. Knows no function and no names."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from limner.errors import InvalidRequest
from limner.spelling import meant

__all__ = ["UnknownArgument", "check_names", "known_names", "named_arguments"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class UnknownArgument(InvalidRequest, TypeError):
    """A function has no such argument. A `TypeError` too, as Python raises."""


def known_names(call: Callable[..., object]) -> list[str]:
    """Return the names of a function's arguments, with those of a `TypedDict` that it unpacks."""
    found: list[str] = []
    for one in inspect.signature(call).parameters.values():
        if one.kind is not one.VAR_KEYWORD:
            found.append(one.name)
        elif unpacked := re.fullmatch(r"Unpack\[(\w+)\]", str(one.annotation)):
            found += inspect.unwrap(call).__globals__[unpacked[1]].__annotations__
    return found


def check_names(names: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raise `UnknownArgument` for the first name that is not known, with the one that may have been meant."""
    allowed = list(known)
    for name in names:
        if name in allowed:
            continue
        near = meant(name, allowed)
        remedy = f"did you mean {near}?" if near else f"allowed: {', '.join(allowed)}"
        raise UnknownArgument(name, f"is not an argument of {where}; {remedy}")


def named_arguments(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function or method so that an unknown name raises `UnknownArgument`.

    Names that `**more: Unpack[...]` stands for are known.
    """
    known = [name for name in known_names(call) if name not in ("self", "cls")]

    @functools.wraps(call)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        check_names(kwargs, known, where=call.__name__.replace("__call__", "a call"))
        return call(*args, **kwargs)

    return checked
