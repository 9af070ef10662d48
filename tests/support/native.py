"""This machine as one whose CPU has no AMX tiles, or whether it has them."""

from __future__ import annotations

import pytest

from limner.native import tiles
from limner.native.build import Library

__all__ = ["has_tiles", "without_tiles"]

has_tiles = pytest.mark.skipif(tiles.why_missing() is not None, reason=f"no AMX tiles: {tiles.why_missing()}")


def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have int8 products done as on a CPU without AMX: oneDNN's, which read packed copies of the weights."""
    missing = Library("tiles", missing=lambda: "the CPU has no AMX for int8", declare=lambda library: None)
    monkeypatch.setattr(tiles, "_library", missing)
