"""A transformer whose single file says everything that a loader needs."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import make_transformer


@pytest.fixture(scope="module")
def wide_state() -> dict[str, torch.Tensor]:
    """A transformer with heads of 128, whose single file says all there is to say; bfloat16 as published ones are."""
    torch.manual_seed(3)
    network = make_transformer(128, double=1, single=1)
    return {name: value.bfloat16() for name, value in network.state_dict().items()}
