"""Places for work that may hang, shared by owners and receivers. Knows nothing of the work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

__all__ = ["Places"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limits:
    """Most places for an owner, for a receiver, and for an owner at a receiver: so nobody blocks a receiver for others."""

    owner: int = 8
    receiver: int = 8
    pair: int = 4


class Places:
    """Places that are taken. Owners with fewer places come first."""

    def __init__(self, *, total: int) -> None:
        self._total = total
        self._limits = _Limits()
        self._owners: Counter[str] = Counter()
        self._receivers: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return self._owners.total()

    def take(self, waiting: list[tuple[str, str]]) -> list[int]:
        """Take places for some of those who wait, as (owner, receiver), the longest first. Return their indices."""
        ahead = self._owners.copy()
        ranked = []
        for index, (owner, _) in enumerate(waiting):
            ranked.append((ahead[owner], index))
            ahead[owner] += 1
        return [index for _, index in sorted(ranked) if self._take(*waiting[index])]

    def give_back(self, owner: str, receiver: str) -> None:
        for counter, key in ((self._owners, owner), (self._receivers, receiver)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        self._pairs[owner, receiver] -= 1
        if not self._pairs[owner, receiver]:
            del self._pairs[owner, receiver]

    def _take(self, owner: str, receiver: str) -> bool:
        limits = self._limits
        if (
            len(self) >= self._total
            or self._owners[owner] >= limits.owner
            or self._receivers[receiver] >= limits.receiver
            or self._pairs[owner, receiver] >= limits.pair
        ):
            return False
        self._owners[owner] += 1
        self._receivers[receiver] += 1
        self._pairs[owner, receiver] += 1
        return True
