"""Free memory, as the system reports it."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from limner.memory.free import collect, free_bytes, spare_garbage_collector


def test_free_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: SimpleNamespace(available=12))
    assert free_bytes() == free_bytes("cpu") == free_bytes(torch.device("cpu")) == 12


def test_unused_blocks_of_the_allocator_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps them for its own tensors."""
    for name, value in {"memory_reserved": 50, "memory_allocated": 20, "mem_get_info": (100, 1000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes("cuda") == 130


class Cycle:
    """An object that keeps itself, as an error does whose traceback has a frame that knows it."""

    def __init__(self) -> None:
        self.itself = self


def test_cycles_are_freed_once_the_collector_is_spared() -> None:
    """A server's objects are frozen before; elsewhere going through all of them would hold every thread."""
    gc.unfreeze()
    gc.disable()
    try:
        held = weakref.ref(Cycle())
        collect()
        assert held() is not None
        spare_garbage_collector()
        held = weakref.ref(Cycle())
        collect()
        assert held() is None
    finally:
        gc.enable()
        gc.unfreeze()


_THREADS = """
import sys, threading, psutil
from limner.memory.free import give_back, share_one_heap

def resident():
    return psutil.Process().memory_info().rss / 2**20

def work():
    held = [bytes(60_000) for _ in range(600)]
    gate.wait()
    del held

if sys.argv[1] == "shared":
    share_one_heap()
large = bytes(31_000_000)
del large  # glibc maps less by itself from now on, and keeps more
before, gate = resident(), threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_what_threads_free_goes_back_to_the_system() -> None:
    command = [sys.executable, "-c", _THREADS]
    kept, shared = (
        float(subprocess.run([*command, how], capture_output=True, check=True, text=True).stdout)
        for how in ("each", "shared")
    )
    assert shared < 4 < kept
