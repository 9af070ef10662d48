"""This machine as one whose CPU has no AMX tiles, or whether it has them."""

from __future__ import annotations

from functools import cache

import pytest

from limner.model import attention, fingerprint
from limner.native import tiles
from limner.native.build import Library

__all__ = ["has_tiles", "without_tiles"]

has_tiles = pytest.mark.skipif(tiles.why_missing() is not None, reason=f"no AMX tiles: {tiles.why_missing()}")


def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have int8 products and attention done as on a CPU without AMX: products are oneDNN's and read packed weights."""
    missing = Library("tiles", files=(), missing=lambda: "the CPU has no AMX", declare=lambda library: None)
    monkeypatch.setattr(tiles, "_library", missing)
    choose = cache(attention.choose_kernel.__wrapped__)  # what was chosen before is not what is chosen now
    for module in (attention, fingerprint):
        monkeypatch.setattr(module, "choose_kernel", choose)
