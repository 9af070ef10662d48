"""The values that were used last, for several threads. Knows nothing of what they are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeVar

__all__ = ["Recent"]

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(OrderedDict[_K, _V]):
    """At most `size` values by key; the one that was not used for longest goes first. Use `find` and `keep`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._lock = threading.Lock()

    def find(self, key: _K) -> _V | None:
        """Return a value, which counts as a use, or None."""
        with self._lock:
            if key in self:
                self.move_to_end(key)
            return self.get(key)

    def keep(self, key: _K, value: _V) -> _V:
        """Keep a value, and return it."""
        with self._lock:
            self[key] = value
            self.move_to_end(key)
            if len(self) > self._size:
                self.popitem(last=False)
            return value
