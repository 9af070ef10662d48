"""Free memory, as the system reports it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from limner.memory.free import free_bytes


def test_free_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: SimpleNamespace(available=12))
    assert free_bytes() == free_bytes("cpu") == free_bytes(torch.device("cpu")) == 12


def test_unused_blocks_of_the_allocator_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps them for its own tensors."""
    for name, value in {"memory_reserved": 50, "memory_allocated": 20, "mem_get_info": (100, 1000)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes("cuda") == 130
