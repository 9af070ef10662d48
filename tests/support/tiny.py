"""Tiny real components with random weights, pictures, and what tests measure with."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import Pipeline

TEXT_LAYERS = (1, 2, 3)
MAX_TOKENS = 40


def make_transformer(
    head_dim: int = 16, *, width_in: int = 16, text_width: int = 48, double: int = 2, single: int = 3
) -> Any:
    """diffusers' transformer with K/V attention processors and weights that make every part count."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    model = Flux2Transformer2DModel(
        in_channels=width_in,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=32,
        axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=False,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # the norms' weights, which would all be 1
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=(1.5 if "modulation" in name else 1.0) * p.shape[1] ** -0.5)
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Gate:
    """Holds calls of the pipeline, before they begin, while it is shut; keeps the prompts of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self._open, self.entered = threading.Event(), threading.Event()
        self._open.set()
        call = Pipeline.__call__

        def held(own: Pipeline, prompt: Any, **options: Any) -> Any:
            self.calls.append(list(prompt))
            self.entered.set()
            assert self._open.wait(60)
            return call(own, prompt, **options)

        monkeypatch.setattr(Pipeline, "__call__", held)

    def shut(self) -> None:
        self.entered.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()
