"""A folder with a manifest and the references of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.batches import ROWS, write
from tests.support.tiny import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png and same.png have the same pixels in other files."""
    picture(96, 70).save(tmp_path / "a.png")
    picture(96, 70).save(tmp_path / "same.png", compress_level=1)
    picture(64, 80, seed=1).save(tmp_path / "b.png")
    write(tmp_path, ROWS)
    return tmp_path
