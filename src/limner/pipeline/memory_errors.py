"""One type for the ways in which torch and Python run out of memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from limner.errors import CapacityError, first_line
from limner.memory.free import forget

__all__ = ["typed_memory_errors"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def typed_memory_errors(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a call so that it raises `CapacityError` where an allocation fails, and holds nothing of what it had."""

    @functools.wraps(call)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            first = first_line(error)
            if isinstance(error, RuntimeError) and not re.search(r"(not enough|out of) memory|can't allocate", first):
                raise
            forget(error)
            raise CapacityError(
                f"memory ran out ({first}); use fewer or smaller references, a smaller output or fewer images at once"
            ) from error

    return wrapped
