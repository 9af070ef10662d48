"""Whatever changes the last bits of a result has another name, and References another key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.native import without_tiles
from tests.support.tiny import generators, make_transformer, picture

from limner import Pipeline
from limner.config import TransformerConfig
from limner.model.feature_maps import fuse
from limner.model.int8 import has_int8_products, quantize_blocks
from limner.model.transformer import Transformer
from limner.native import tiles


def test_narrowed_float32_has_another_name() -> None:
    """torch.set_float32_matmul_precision lets float32 products be rounded to TF32 or bfloat16."""
    transformer = Transformer(TransformerConfig.from_diffusers(make_transformer(16).config))
    names = []
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            names.append(transformer.arithmetic)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert len(set(names)) == 3
    assert names[1].endswith("/tf32 products")


def test_arithmetic_is_part_of_the_key(tiny_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    keys = set()
    for dtype in (torch.bfloat16, torch.float32):
        pipe.transformer.use_arithmetic(dtype)
        keys.add(pipe.prefill(picture(64, 64)).key)
    assert len(keys) == 2
    assert pipe("a dog", image=picture(64, 64), generator=generators(1)[0]).images


def test_the_layout_of_the_encoder_s_maps_is_part_of_the_key(pipe: Pipeline) -> None:
    """That of the decoder is not: K/V do not depend on it."""
    before, seen = pipe.kernel, {pipe.prefill(picture(64, 64)).key}
    fuse(pipe.autoencoder.network.decoder)
    assert pipe.kernel == before
    fuse(pipe.autoencoder.network.encoder)
    assert pipe.kernel.startswith(f"{before}/channels last")
    seen.add(pipe.prefill(picture(64, 64)).key)
    assert len(seen) == 2


def test_the_name_of_the_arithmetic_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 products run on CPUs alone, in two ways: elsewhere weights are widened, and the key says so."""
    config = TransformerConfig.from_diffusers(make_transformer(64, double=1, single=1).config)
    transformer = Transformer(config)
    quantize_blocks(transformer)
    on_cpu = transformer.arithmetic
    assert on_cpu.startswith("cpu/")
    has_tiles = has_int8_products() and tiles.why_missing() is None
    assert (f"int8 tiles {tiles.digest()}" in on_cpu) == has_tiles
    without_tiles(monkeypatch)
    assert (transformer.arithmetic != on_cpu) == has_tiles
    assert ("int8 dot products" in transformer.arithmetic) == has_int8_products()
    elsewhere = transformer.to("meta").arithmetic
    assert elsewhere.startswith("meta/")
    assert elsewhere.endswith("/int8 widened")
