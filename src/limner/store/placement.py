"""Where References are in memory: one tier for each device, one for the host, and the moves between them.

What a device evicts goes to host memory, and from there to disk or the bucket. Copying to a device keeps the host
copy, which ages by LRU, so that evicting from the device needs no copy back. Knows no files.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from limner.memory.free import free_bytes
from limner.references import References
from limner.store.memory_tier import MemoryTier
from limner.store.tier import FAILURES, Refused

__all__ = ["Placement", "with_index"]

_logger = logging.getLogger("limner")
_CPU = torch.device("cpu")
_SHARE = 4
"""A budget that is not given is this part of the memory that is free."""


class Placement:
    """The memory tiers of a store. `on_evict` is given what host memory evicts, and what it has no room for."""

    def __init__(
        self, *, device_bytes: int | None, memory_bytes: int | None, on_evict: Callable[[References], None]
    ) -> None:
        self._device_bytes, self._on_evict = device_bytes, on_evict
        self._pinned: set[str] = set()
        self._lock = threading.Lock()
        self._devices: dict[torch.device, MemoryTier] = {}
        self.host = self._new_tier("memory", _CPU, memory_bytes)

    @property
    def tiers(self) -> list[MemoryTier]:
        """Those of devices, then that of the host."""
        with self._lock:
            return [*self._devices.values(), self.host]

    def tier(self, device: torch.device) -> MemoryTier:
        """Return the tier of a device, made when it is first used."""
        if device.type == "cpu":
            return self.host
        with self._lock:
            if device not in self._devices:
                self._devices[device] = self._new_tier("device", device, self._device_bytes)
            return self._devices[device]

    def _new_tier(self, name: str, device: torch.device, budget: int | None) -> MemoryTier:
        budget = free_bytes(device) // _SHARE if budget is None else budget
        return MemoryTier(name, device, budget, pinned=self._pinned, on_evict=self._demote)

    def get(self, key: str, device: torch.device) -> tuple[str, References | None]:
        """Return the entry on a device, else in host memory, else on another device; and the name of its tier."""
        for tier in (self.tier(device), self.host, *self.tiers):
            if (references := tier.get(key)) is not None:
                return tier.name, references
        return self.host.name, None

    def place(self, references: References, device: torch.device) -> References:
        """Return References on a device, cached there, if its tier has room alongside pinned entries; else as they are."""
        if references.device == device:
            return references
        tier = self.tier(device)
        if (there := tier.get(references.key)) is not None:
            return there
        if not tier.has_room(references) and device.type != "cpu":
            return references
        moved = references.to(device)
        self._put(moved)
        return moved

    def cache(self, references: References, device: torch.device) -> References:
        """Cache an entry on a device, else in host memory. Return it as it is there. Log failures."""
        try:
            if references.device != device and (device.type == "cpu" or self.tier(device).has_room(references)):
                return self.place(references, device)
            is_host = references.device.type == "cpu"
            if is_host and device.type == "cuda" and self.host.has_room(references):
                references = references.to_host(page_locked=True)
            if not self._put(references) and not is_host:
                self._demote(references)
        except FAILURES as error:
            _logger.warning("references %s are not cached in memory: %s", references.key[:16], error)
        return references

    def _put(self, references: References) -> bool:
        """Cache an entry in the memory where it is. Returns False if it has no room there."""
        try:
            self.tier(references.device).put(references)
        except Refused:
            return False
        return True

    def _demote(self, references: References) -> None:
        """Move an entry from a device to host memory, or from there to the tiers below. Log failures."""
        if self.host.knows(references.key):
            return
        try:
            if references.device.type != "cpu" and self.host.has_room(references):
                self._put(references.to_host(page_locked=references.device.type == "cuda"))
            else:
                self._on_evict(references)
        except FAILURES as error:
            _logger.warning("references %s are not cached in memory: %s", references.key[:16], error)


def with_index(device: torch.device | str) -> torch.device:
    """Return a device under the name that its tensors give it."""
    device = torch.device(device)
    return torch.empty(0, device=device).device if device.index is None else device
