"""Pixels as tensors and as pictures."""

from __future__ import annotations

import torch

from limner.images import to_pil


def test_to_pil_rounds() -> None:
    values = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert to_pil(values)[0].getpixel((0, 0)) == (0, 128, 255)
