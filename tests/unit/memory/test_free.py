"""Free memory, as the system reports it."""

from __future__ import annotations

import gc
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
