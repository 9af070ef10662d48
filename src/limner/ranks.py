"""The processes that run one model together, as torchrun starts them: joining them, printing once, failing as one.

Owns torchrun's environment variables, the process group, and which process prints for all. Does not know pipelines nor how
a model is divided (`limner.model.shards`, `limner.model.divide`). Imports torch only where processes are joined.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from limner.errors import InvalidRequest, first_line

if TYPE_CHECKING:
    import torch

    from limner.model.shards import Ranks

__all__ = ["exit_silently", "join", "own_device", "speaks", "started", "together"]

_VARIABLES = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Only torchrun sets the first; other launchers set the rest."""
_ENDED = "limner/ended"
_GRACE = 10.0
"""Seconds that a process without an error of its own waits for torchrun to end it."""


def started() -> bool:
    """Return True if this process is one of several that torchrun started."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def speaks() -> bool:
    """Return True if this process prints for all: it is the only one, or the first of several."""
    return not started() or os.environ["RANK"] == "0"


def exit_silently() -> NoReturn:
    """Wait, then exit with code 2: torchrun ends all processes at the first exit, and another prints the error first."""
    time.sleep(_GRACE)
    raise SystemExit(2)


def join(mode: str | None, device: torch.device) -> tuple[Ranks, torch.device]:
    """Return this process's place among those that run a model together, and its device: for "cuda" a GPU of its own.

    `mode` None is a model in this process alone. The processes are those of torch's default process group, which is made
    if there is none. Raises `InvalidRequest`.
    """
    from limner.model.shards import RankGroup, Ranks, check_mode

    if mode is None:
        return Ranks.single(), device
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    check_mode(mode)
    device = own_device(device)
    if not dist.is_initialized():
        _start(device.type)
    return RankGroup(mode, init_device_mesh(device.type, (dist.get_world_size(),))), device


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process; `device` is the same in all. Raises `InvalidRequest`."""
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise InvalidRequest(
            "device", f"{device} cannot be that of each process of a parallel model; use cpu, or cuda for a GPU each"
        )
    if device.type == "cpu":
        return device
    import torch

    index, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= found:
        raise InvalidRequest(
            "device",
            f"cuda: process {index} of this machine has no GPU of its own, there are {found}; start as many processes",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def together(device: str) -> Iterator[bool]:
    """Run the work of a process on a kind of device; yields True in the one process that writes and prints for all.

    All processes end when one fails. The first that fails raises its error. The others, which fail in the same way or
    because the first is gone, exit with code 2 and print nothing.
    """
    import torch.distributed as dist

    from limner.model.shards import peer_errors

    store, rank = _start(device)
    try:
        yield rank == 0
        with peer_errors():
            dist.barrier()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the process with the store is gone: print the error, perhaps twice
            if store.add(_ENDED, 1) > 1:
                exit_silently()
        raise
    dist.destroy_process_group()


def _start(device: str) -> tuple[Any, int]:
    """Make the default process group of torchrun's processes; return its store and the rank. Raises `InvalidRequest`."""
    if not started():
        raise InvalidRequest(
            "parallel",
            "needs several processes, and this is one; start them with torchrun --nproc-per-node 2 -m limner edit ..., or "
            "leave it out",
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://")))
        gpus = device.startswith("cuda") and torch.cuda.is_available()  # without GPUs, loading raises the error
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InvalidRequest(
            "parallel", f"the processes did not find each other ({reason}); start them with torchrun"
        ) from error
    return store, rank
