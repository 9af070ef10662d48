"""Free memory of a device, as the system reports it now. Knows nothing of who is going to use it."""

from __future__ import annotations

import psutil
import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can be allocated on a device, unused blocks of torch's CUDA allocator included.

    For a device other than CUDA: the available memory of the host.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
