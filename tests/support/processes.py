"""Several processes of one parallel model, for tests: each runs a function and gives back what it made."""

from __future__ import annotations

import datetime
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=300)


def run_processes(function: Callable[..., Any], folder: Path, *args: object, size: int = 2) -> list[Any]:
    """What `function(rank, size, *args)` gives in each of `size` processes that are joined by gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.start_processes(_work, args=(size, folder, function, args), nprocs=size, start_method="spawn")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _work(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ["LIMNER_CACHE"] = str(folder / "cache")
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        made = function(rank, size, *args)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(made))
        dist.barrier()
    except BaseException as error:
        print(f"process {rank}: {error!r}", file=sys.stderr)
        raise
    dist.destroy_process_group()
