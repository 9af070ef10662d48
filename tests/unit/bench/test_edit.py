"""Engines of `limner bench` with masks and weights draw what they say."""

from __future__ import annotations

import torch

from limner.bench import Bench, BenchCase, geometry


def test_masks_and_weights() -> None:
    """A mask keeps half of the canvas; weights change the result, and none changes a bit."""
    bench = Bench(geometry(1, 1, 1), dtype=torch.float32)
    case = BenchCase(num_references=2, side=64, reference_side=64, num_text=8, num_inference_steps=2)
    given = bench.inputs(case)
    calls = bench._calls(case, given, ("warm", "masked", "weighted"))
    with torch.no_grad():
        plain, masked, weighted = (calls[name]() for name in ("warm", "masked", "weighted"))
        cached = bench.ours.prefill(given["ref"], given["ref_ids"])
        ones = bench.limner(case, given, cached=cached, weights=((16, 1.0), (16, 1.0)))
    assert torch.equal(ones, plain)
    assert not torch.allclose(weighted, plain)
    canvas = bench.surroundings(given).canvas.view(4, 4, -1)
    kept = (masked.view(4, 4, -1) == canvas).all(-1)
    assert kept[:, :2].all()
    assert not kept[:, 2:].any()
    assert weighted.isfinite().all()
