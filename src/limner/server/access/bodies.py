"""How much of requests' bodies may be in memory, and how many may be on their way: of one owner, and in all.

Knows nothing of what bodies hold.
"""

from __future__ import annotations

from collections import Counter

from limner.errors import QueueFull, RateLimited
from limner.server.access.keys import Owner

__all__ = ["Bodies", "Body"]

_SHARE = 4
"""An owner may have a quarter of the bytes, where there are others."""
_COMING = 64
"""Bodies of one owner that may be on their way, where there are others."""
_RETRY_SECONDS = 5


class Bodies:
    """The bodies that are read or worked on, of at most `max_bytes` together. For one event loop.

    `shared`: several owners use the service, so that none may have more than a share.
    """

    def __init__(self, *, max_bytes: int, shared: bool) -> None:
        self._max_bytes = max_bytes
        self._max_of_owner = max_bytes // _SHARE if shared else None
        self._max_coming = _COMING if shared else None
        self._bytes: Counter[str] = Counter()
        self._coming: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._bytes.total()

    def open(self, owner: Owner) -> Body:
        """Count a body that begins to come. Raises `RateLimited` if the owner has too many of them."""
        if self._max_coming is not None and self._coming[owner.id] >= self._max_coming:
            raise RateLimited(
                f"{owner.name} sends {self._max_coming} bodies at once, as many as may be; send them one after another",
                retry_after=_RETRY_SECONDS,
            )
        self._coming[owner.id] += 1
        return Body(self, owner)

    def _take(self, owner: Owner, num_bytes: int) -> None:
        if self._max_of_owner is not None and self._bytes[owner.id] + num_bytes > self._max_of_owner:
            raise RateLimited(
                f"the requests of {owner.name} have over {self._max_of_owner} bytes at once; wait for their answers",
                retry_after=_RETRY_SECONDS,
            )
        if self.num_bytes + num_bytes > self._max_bytes:
            raise QueueFull("too many large requests at once; try again later")
        self._bytes[owner.id] += num_bytes


class Body:
    """One body, from its first byte until the request is answered."""

    def __init__(self, bodies: Bodies, owner: Owner) -> None:
        self._bodies, self._owner = bodies, owner
        self.num_bytes = 0
        self._is_coming = True

    def take(self, num_bytes: int) -> None:
        """Count bytes that came. Raises `RateLimited` and `QueueFull`."""
        self._bodies._take(self._owner, num_bytes)
        self.num_bytes += num_bytes

    def come(self) -> None:
        """Note that it is whole. A second call does nothing."""
        if self._is_coming:
            self._is_coming = False
            _subtract(self._bodies._coming, self._owner.id, 1)

    def close(self) -> None:
        """Release what it took."""
        self.come()
        _subtract(self._bodies._bytes, self._owner.id, self.num_bytes)
        self.num_bytes = 0


def _subtract(counter: Counter[str], key: str, number: int) -> None:
    counter[key] -= number
    if not counter[key]:
        del counter[key]
