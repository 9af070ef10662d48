"""References that an assistant keeps under names, for as long as the process runs: prepared pictures in order.

Their K/V are in the engine's store, by content. So a name holds no result of an earlier model or picture: what it holds are
pixels. Knows nothing of the protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from limner.errors import InvalidRequest
from limner.images import PreparedReference

__all__ = ["MAX_BYTES", "Kept", "KeptReferences"]

MAX_BYTES = 1 << 30
"""Bytes of pixels under all names; over 300 references of 1024x1024."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Kept:
    """References under a name; `key` is their content key."""

    name: str
    key: str
    pictures: tuple[PreparedReference, ...]

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(picture.report.digest for picture in self.pictures)

    @property
    def nbytes(self) -> int:
        return sum(len(picture.data) for picture in self.pictures)


class KeptReferences:
    """References by name, in the order in which they were kept. Used in one event loop."""

    def __init__(self) -> None:
        self._by_name: dict[str, Kept] = {}

    def __iter__(self) -> Iterator[Kept]:
        return iter(list(self._by_name.values()))

    def get(self, name: str, *, field: str) -> Kept:
        """Raises `InvalidRequest` that names `field` where nothing has this name."""
        if name not in self._by_name:
            names = ", ".join(self._by_name) or "none; keep_references makes them"
            raise InvalidRequest(field, f"nothing is kept as {name!r}; kept are: {names}")
        return self._by_name[name]

    def check(self, name: str, pictures: tuple[PreparedReference, ...], *, replace: bool) -> None:
        """Raise `InvalidRequest` where pictures may not be kept under a name."""
        held = self._by_name.get(name)
        if held is not None and not replace and held.digests != tuple(p.report.digest for p in pictures):
            raise InvalidRequest("name", f"{name!r} holds other pictures; choose another name, or give replace: true")
        nbytes = sum(len(p.data) for p in pictures) + sum(kept.nbytes for kept in self if kept.name != name)
        if nbytes > MAX_BYTES:
            raise InvalidRequest(
                "pictures", f"all kept pictures would have {nbytes} bytes, over {MAX_BYTES}; forget_references first"
            )

    def put(self, kept: Kept) -> None:
        self._by_name[kept.name] = kept

    def remove(self, name: str) -> Kept:
        """Raises `InvalidRequest` where nothing has this name."""
        self.get(name, field="name")
        return self._by_name.pop(name)
