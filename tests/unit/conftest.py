"""Components that tests of several packages use."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.lora_files import SHAPES, kohya, make_pairs, original, write

from limner import Pipeline


@pytest.fixture
def styled(pipe: Pipeline, tmp_path: Path) -> Pipeline:
    """With LoRAs a and b, of which a acts."""
    pipe.load_lora_weights(write(tmp_path, original(make_pairs()), "a.safetensors"), "a")
    pipe.load_lora_weights(write(tmp_path, kohya(make_pairs(1, names=SHAPES), alpha=2.0), "b.safetensors"), "b")
    pipe.set_adapters(["a"], [0.7])
    return pipe
