"""Pages of tensors that are mapped from files: how many are resident, dropping them, reading them ahead.

A page that was dropped comes back from the file with the same bits. A page that was written to (a LoRA merged in place) is
the process's own and would come back as it was in the file, so a tensor with such a page is never released. Linux reports
written pages by `PAGEMAP_SCAN`, or in /proc/self/pagemap before 6.7; on other systems nothing can be released. Knows
tensors, and neither modules nor limits.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

__all__ = ["can_release", "file_backed", "read_ahead", "release", "resident"]

_logger = logging.getLogger("limner")
_PAGE = mmap.PAGESIZE
_SCAN = (3 << 30) | (96 << 16) | (ord("f") << 8) | 16
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4


def can_release() -> bool:
    """Return True if this system can drop pages of mapped files and report which were written to."""
    return sys.platform == "linux" and Path("/proc/self/pagemap").exists() and Path("/proc/self/smaps_rollup").exists()


def resident() -> tuple[int, int]:
    """Return the resident bytes of this process, and how many of them are anonymous."""
    found = {"Rss": 0, "Anonymous": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) << 10
    return found["Rss"], found["Anonymous"]


def release(tensor: Tensor) -> bool:
    """Drop the pages of a mapped tensor; False if that would lose data. Pages shared with other tensors stay."""
    span = _span(tensor)
    if span is None or not _is_clean(*span):
        return False
    _advise(*span, mmap.MADV_DONTNEED)
    return True


def read_ahead(tensor: Tensor) -> None:
    """Ask the system to read the pages of a mapped tensor soon; return at once."""
    if (span := _span(tensor)) is not None:
        _advise(*span, mmap.MADV_WILLNEED)


def file_backed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors whose memory is a mapped file."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            low, _, high = addresses.partition("-")
            files.append((int(low, 16), int(high, 16)))
    starts = [low for low, _ in files]

    def is_mapped(tensor: Tensor) -> bool:
        at = bisect.bisect_right(starts, tensor.data_ptr()) - 1
        return at >= 0 and tensor.data_ptr() + tensor.nbytes <= files[at][1]

    return [tensor for tensor in tensors if tensor.device.type == "cpu" and is_mapped(tensor)]


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Return the address range of a CPU tensor's whole pages; None if there are none."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    return (start, stop) if stop > start else None


def _advise(start: int, stop: int, advice: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice):
        _logger.debug("madvise(%d) of %d bytes: errno %d", advice, stop - start, ctypes.get_errno())


def _is_clean(start: int, stop: int) -> bool:
    """Return True if no page of a range is the process's own (anonymous or swapped out)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        with contextlib.suppress(OSError):
            return not _scan(file.fileno(), start, stop)
        file.seek(start // _PAGE * 8)  # a kernel before 6.7: 8 bytes a page; bit 63 present, 62 swapped, 61 of a file
        entries = np.frombuffer(file.read((stop - start) // _PAGE * 8), dtype=np.uint64)
        present, swapped, of_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
        return not bool(((present & (of_file ^ np.uint64(1))) | swapped).any())


def _scan(pagemap: int, start: int, stop: int) -> int:
    """Count ranges, at most 1, with pages that are present or swapped out and of no file (ioctl PAGEMAP_SCAN)."""
    import fcntl

    found = (ctypes.c_uint64 * 3)()
    fields = (96, 0, start, stop, 0, ctypes.addressof(found), 1, 1, _FILE, _FILE, _PRESENT | _SWAPPED, _PRESENT)
    argument = bytearray(b"".join(value.to_bytes(8, "little") for value in fields))
    return int(fcntl.ioctl(pagemap, _SCAN, argument, True))
