"""How many event streams may be open: of one owner, and in all. Knows nothing of what they carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NoReturn

from limner.errors import RateLimited
from limner.server.access.keys import Owner

__all__ = ["Streams"]

_OF_OWNER = 32
_RETRY_SECONDS = 5


class Streams:
    """Open event streams, at most `total`, of one owner at most 32 and half of all. For one event loop."""

    def __init__(self, *, total: int) -> None:
        self._total = max(2, total)
        self._of_owner = max(1, min(_OF_OWNER, self._total // 2))
        self._open: Counter[str] = Counter()

    def open(self, owner: Owner) -> Callable[[], None]:
        """Count a stream, and return what ends it. Raises `RateLimited`."""
        self.check(owner)
        self._open[owner.id] += 1

        def close() -> None:
            self._open[owner.id] -= 1
            if not self._open[owner.id]:
                del self._open[owner.id]

        return close

    def check(self, owner: Owner) -> None:
        """Raise `RateLimited` if the owner may open no further stream now."""
        of_owner, in_all = self._open[owner.id], self._open.total()
        if of_owner >= self._of_owner:
            self._refuse(f"{owner.name} has {of_owner} event streams open and may have {self._of_owner}")
        if in_all >= self._total:
            self._refuse(f"{in_all} event streams are open, as many as there may be")

    def _refuse(self, problem: str) -> NoReturn:
        raise RateLimited(f"{problem}; close one, or poll GET /v1/jobs/{{id}}", retry_after=_RETRY_SECONDS)
