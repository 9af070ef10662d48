"""Free memory of a device, as the system reports it now; giving back what is free here; not looking where nothing is.

Knows nothing of who is going to use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import traceback

import psutil
import torch

__all__ = ["collect", "forget", "free_bytes", "give_back", "share_one_heap", "spare_garbage_collector"]

_M_ARENA_MAX = -8
"""glibc's malloc.h: the most heaps."""


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can be allocated on a device, unused blocks of torch's CUDA allocator included.

    For a device other than CUDA: the available memory of the host.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def give_back() -> None:
    """Return memory to the system that was freed, and that the C library keeps for later; where it is glibc.

    It keeps each free piece below one in use. Bodies and pictures come and go among small objects that stay, so a server
    would seem to need what it needed at its worst.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def collect() -> None:
    """As `give_back`, after cycles of objects are freed, too: an error and its traceback hold a request and its body.

    Only after `spare_garbage_collector`, which makes that quick: it holds every thread.
    """
    if gc.get_freeze_count():
        gc.collect()
    give_back()


def share_one_heap() -> None:
    """Let threads that begin from now on allocate where the main one does; where the C library is glibc.

    It would give most of them a heap of their own, and `give_back` cannot return what is free at the end of those.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def spare_garbage_collector() -> None:
    """Let Python's collector of cycles leave alone what is there now: modules and networks, half a million objects.

    They live as long as the process. Going through all of them held every thread for a quarter of a second, now and then.
    """
    gc.collect()
    gc.freeze()


def forget(error: BaseException | None) -> None:
    """Let go of the tensors of calls that failed for want of memory, and give a GPU's unused memory back.

    The frames of a traceback hold all local variables. They are emptied; the lines stay readable.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
