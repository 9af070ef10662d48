"""The measured cost of reading entries back from a tier, and whether an entry is worth writing there.

Knows bytes and seconds, not what a tier is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from limner.references import References
from limner.store.tier import Refused

__all__ = ["ReadCost", "time_read"]

_LARGE = 8 << 20
"""Bytes from which an entry tells the rate; smaller ones tell the overhead."""
_FIRST_PATIENCE, _LAST_PATIENCE = 8, 1024
_READ_BACK = 3
"""The first entries that are written are read back, to measure it."""


class ReadCost:
    """A running estimate of the seconds that reading takes: an overhead, and seconds for each byte of large entries."""

    def __init__(self) -> None:
        self.overhead: float | None = None
        self.seconds_per_byte: float | None = None
        self._refusals, self._patience = 0, _FIRST_PATIENCE
        self._to_read_back = _READ_BACK

    def expected(self, nbytes: int) -> float:
        """Return the expected seconds for reading so many bytes."""
        return (self.overhead or 0.0) + (self.seconds_per_byte or 0.0) * nbytes

    def measure(self, seconds: float, nbytes: int) -> None:
        """Note that reading so many bytes took so many seconds. Small entries tell the overhead, large ones the rate."""
        if nbytes >= _LARGE:
            rate = max(0.0, seconds - (self.overhead or 0.0)) / nbytes
            self.seconds_per_byte = _mean(self.seconds_per_byte, rate)
        else:
            self.overhead = _mean(self.overhead, max(0.0, seconds - (self.seconds_per_byte or 0.0) * nbytes))

    def slower_than_prefill(self, references: References) -> bool:
        """Return True if reading is expected to take longer than the prefill took. False if that is not known."""
        return 0 < references.prefill_seconds <= self.expected(references.nbytes)

    def is_worth_a_write(self, references: References) -> bool:
        """Return True if reading should be faster than the prefill.

        After 8 refusals in a row it is True all the same, so that the cost is measured again: a slow disk may only have
        been busy. Each time that this was in vain, the number of refusals doubles, up to 1024.
        """
        if not self.slower_than_prefill(references):
            self._refusals, self._patience = 0, _FIRST_PATIENCE
            return True
        self._refusals += 1
        if self._refusals <= self._patience:
            return False
        self._refusals, self._patience = 0, min(2 * self._patience, _LAST_PATIENCE)
        return True

    def should_read_back(self, references: References) -> bool:
        """Return True if an entry is to be read back once it is written: one of the first, or one expected to be slow."""
        if self._to_read_back <= 0 and not self.slower_than_prefill(references):
            return False
        self._to_read_back -= 1
        return True

    def check(self, seconds: float, references: References) -> None:
        """Note what reading an entry back took. Raises `Refused` if its prefill was faster."""
        self.measure(seconds, references.nbytes)
        if 0 < references.prefill_seconds <= seconds:
            raise Refused(f"reading takes {seconds:.3f} s, a prefill {references.prefill_seconds:.3f} s")


def _mean(old: float | None, new: float) -> float:
    """Return a running mean. It follows a fall to less than half at once: the disk was only busy before."""
    return new if old is None or new < old / 2 else 0.7 * old + 0.3 * new


def time_read(path: Path) -> float:
    """Return the seconds to read a pack, from the disk itself where the system drops its cached pages."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    References.load(path)
    return time.perf_counter() - start
