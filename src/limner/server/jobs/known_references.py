"""What an owner is told of the K/V of references: nothing that only another owner's use explains.

K/V are shared by content, so that a second owner's first use of the same pictures may be a hit. It is told as the miss
that it would have been without the others. Works in one event loop. Knows no engines and no HTTP.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

from limner.server.jobs.offload import Offload
from limner.server.jobs.store import JobStore

__all__ = ["KnownReferences", "Told"]

_MAX_OWNERS, _MAX_KEYS, _MAX_JOBS = 1000, 2000, 1000
_ERROR = 0.1  # how far an estimate may be from the time of another owner's prefill, which the exact value would tell


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """Where K/V were, and the seconds of their prefill. `is_changed`: it is not what happened."""

    source: str
    seconds: float
    is_changed: bool = False

    @property
    def saved(self) -> float:
        """The seconds that were saved."""
        return 0.0 if self.source in ("miss", "none") else self.seconds


class KnownReferences:
    """The content keys that each owner has used, with the seconds that were told as those of the prefill (None: its own).

    `is_shared`: everything is told to everybody. What earlier processes told is read from the handles and the last
    jobs of an owner when it is asked for first.
    """

    def __init__(self, jobs: JobStore, *, offload: Offload, is_shared: bool) -> None:
        self.is_shared = is_shared
        self._jobs = jobs
        self._offload = offload
        self._owners: OrderedDict[str, OrderedDict[str, float | None]] = OrderedDict()

    async def tell(self, owner: str, key: str, *, source: str, seconds: float) -> Told:
        """Note a use of references, whose prefill takes or took `seconds`, and return what the owner may be told of it."""
        if self.is_shared or source == "none":
            return Told(source=source, seconds=seconds)
        known = await self._of(owner)
        told = Told(source=source, seconds=seconds)
        if source == "miss":
            known[key] = None
        elif key in known:
            told = Told(source=source, seconds=known[key] or seconds)
        else:
            known[key] = seconds = seconds * random.uniform(1 - _ERROR, 1 + _ERROR)
            told = Told(source="miss", seconds=seconds, is_changed=True)
        known.move_to_end(key)
        if len(known) > _MAX_KEYS:
            known.popitem(last=False)
        return told

    async def has(self, owner: str, key: str) -> bool:
        """Return whether an owner may be told that K/V are cached."""
        return self.is_shared or key in await self._of(owner)

    async def forget(self, owner: str, key: str) -> None:
        """Forget that an owner used references, as when their handle is deleted."""
        if not self.is_shared:
            (await self._of(owner)).pop(key, None)

    async def _of(self, owner: str) -> OrderedDict[str, float | None]:
        if owner not in self._owners:
            found = await self._offload.store(self._read, owner)
            self._owners.setdefault(owner, found)
        self._owners.move_to_end(owner)
        if len(self._owners) > _MAX_OWNERS:
            self._owners.popitem(last=False)
        return self._owners[owner]

    def _read(self, owner: str) -> OrderedDict[str, float | None]:
        known: OrderedDict[str, float | None] = OrderedDict()
        for job in reversed(self._jobs.of_owner(owner, limit=_MAX_JOBS)):
            if key := job.result.get("reference_key"):
                known[key] = job.result["seconds_saved"] or known.get(key)
        for handle in self._jobs.handles(owner):
            if handle.prefill_seconds is not None:  # the K/V were computed at the upload
                known[handle.key] = handle.prefill_seconds
        return known
