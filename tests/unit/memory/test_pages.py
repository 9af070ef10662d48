"""Pages of mapped tensors: they leave and come back, and written ones stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from limner.memory.pages import can_release, file_backed, release, resident

needs_release = pytest.mark.skipif(not can_release(), reason="the system cannot drop pages of mapped files")


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[torch.Tensor]:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"x": torch.arange(1 << 20, dtype=torch.float32)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        yield file.get_tensor("x")


@needs_release
def test_pages_leave_and_come_back(mapped: torch.Tensor) -> None:
    assert file_backed([mapped, torch.zeros(4)]) == [mapped]
    assert mapped.sum() > 0
    before = resident()
    assert release(mapped)
    assert resident()[0] < before[0] - (3 << 20)
    assert torch.equal(mapped, torch.arange(1 << 20, dtype=torch.float32))


@needs_release
@pytest.mark.parametrize("scans", [True, False], ids=["scan", "pagemap"])
def test_what_was_written_stays(scans: bool, mapped: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was changed in place is not what is in the file."""
    if not scans:

        def no_scan(*_: int) -> int:
            raise OSError("before Linux 6.7")

        monkeypatch.setattr("limner.memory.pages._scan", no_scan)
    assert mapped.sum() > 0
    assert release(mapped)
    mapped[500_000] = -1
    assert not release(mapped)
    assert mapped[500_000] == -1
    own = torch.ones(1 << 20)
    assert not release(own)
    assert own.sum() == 1 << 20
