"""The matrices of the tiny transformer."""

from __future__ import annotations

import pytest

from limner import Pipeline
from limner.model.lora import matrix_shapes


@pytest.fixture
def shapes(pipe: Pipeline) -> dict[str, tuple[int, int]]:
    return matrix_shapes(pipe.transformer)
