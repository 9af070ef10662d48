"""Digests of networks: every change of weights or geometry is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.tiny import picture

from limner import InvalidRequest, Pipeline


@pytest.mark.parametrize("part", ["transformer", "autoencoder", "text_encoder"])
def test_writes_that_leave_no_version_are_seen(part: str, pipe: Pipeline) -> None:
    """As many LoRA mergers write: through `.data`."""
    before, refs = pipe.digest, pipe.prefill(picture(64, 64))
    pipe("a dog", height=64, width=64)
    tokens = next(iter(pipe._prompts._cache.values()))[0]
    for p in getattr(pipe, part).parameters():
        p.data.mul_(1.5)
    assert pipe.digest != before
    assert (pipe.prefill(picture(64, 64)).key == refs.key) == (part == "text_encoder")
    pipe("a dog", height=64, width=64)
    changed = not torch.equal(list(pipe._prompts._cache.values())[-1][0], tokens)
    assert changed == (part == "text_encoder")


def test_writes_to_some_rows_are_seen(pipe: Pipeline) -> None:
    """A LoRA of the queries changes a part of a fused matrix, `.data` leaves no version."""
    matrix = pipe.transformer.single_transformer_blocks[1].attn.to_qkv_mlp_proj.weight
    seen = {pipe.reference_weights}
    for rows in (slice(0, 32), slice(32, 33), slice(-1, None)):
        matrix.data[rows] *= 3
        seen.add(pipe.reference_weights)
    matrix.data[:, 5] *= 3
    assert len(seen | {pipe.reference_weights}) == 5


@pytest.mark.parametrize("change", [{"rope_theta": 3000.0}, {"eps": 1e-5}, {"rope_axes": (2, 2, 4, 8)}], ids=str)
def test_the_key_covers_the_geometry_of_the_transformer(change: dict[str, Any], pipe: Pipeline) -> None:
    refs = pipe.prefill(picture(64, 64))
    pipe.transformer.config = replace(pipe.transformer.config, **change)
    assert pipe.prefill(picture(64, 64)).key != refs.key
    with pytest.raises(InvalidRequest, match="they were made with weights"):
        pipe("a dog", references=refs)


@pytest.mark.parametrize("change", [{"norm_num_groups": 4}, {"batch_norm_eps": 1e-3}], ids=str)
def test_the_key_covers_the_geometry_of_the_autoencoder(change: dict[str, Any], pipe: Pipeline) -> None:
    before = pipe.reference_weights
    pipe.autoencoder.network.config |= change
    assert pipe.reference_weights != before
