"""Noise: which seeds a result names."""

from __future__ import annotations

import torch
from tests.support.tiny import generators

from limner import Pipeline


def test_drawn_seeds_differ_and_given_ones_are_told(pipe: Pipeline) -> None:
    out = pipe("a dog", height=64, width=64, num_images_per_prompt=3)
    assert len(set(out.seeds)) == 3
    assert pipe("a dog", height=64, width=64, generator=generators(42)[0]).seeds == (42,)
    assert pipe("a dog", latents=torch.randn(1, 16, 4, 4)).seeds == (None,)
    used = generators(42)[0]
    torch.randn(1, generator=used)
    assert pipe("a dog", height=64, width=64, generator=used).seeds == (None,)
    shared = pipe("a dog", height=64, width=64, generator=generators(42)[0], num_images_per_prompt=2)
    assert shared.seeds == (42, None)
