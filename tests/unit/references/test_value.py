"""References as values: with a pipeline, quantized, and the agreement of their parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.support.tiny import generators, picture

from limner import InvalidRequest, Pipeline, References
from limner.model.kv import LayerKV, quantize_layer


def test_pack_round_trip(pipe: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    refs = pipe.prefill([picture(100, 70), picture(64, 64, seed=1)])
    refs.save(tmp_path / "pack.safetensors")
    loaded = References.load(tmp_path / "pack.safetensors")
    assert (loaded.key, loaded.weights, loaded.reports) == (refs.key, refs.weights, refs.reports)
    assert (loaded.num_tokens, loaded.nbytes, loaded.sizes) == (6 * 4 + 16, refs.nbytes, ((96, 64), (64, 64)))
    for mine, theirs in zip(refs.layers, loaded.layers, strict=True):
        assert torch.equal(mine.k, theirs.k)
        assert torch.equal(mine.v, theirs.v)
    fresh = Pipeline.from_pretrained(tiny_folder)
    pictures = [
        p("a dog", references=r, generator=generators(1)[0], output_type="pt").images
        for p, r in ((pipe, refs), (fresh, loaded))
    ]
    assert torch.equal(*pictures)


def test_pack_of_other_weights_is_refused(pipe: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    pipe.prefill(picture(64, 64)).save(tmp_path / "pack.safetensors")
    other = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    with pytest.raises(
        InvalidRequest, match=f"made with weights {pipe.reference_weights}, this pipeline has {other.reference_weights}"
    ):
        other("a dog", references=References.load(tmp_path / "pack.safetensors"))


def test_layers_of_other_shapes_are_refused(pipe: Pipeline) -> None:
    refs = pipe.prefill(picture(64, 64))
    refs.check()
    layers = (LayerKV(*(x[:, :3] for x in refs.layers[0])), *refs.layers[1:])
    with pytest.raises(ValueError, match=r"keys or values of shape \[1, 3, 2, 16\]"):
        dataclasses.replace(refs, layers=layers).check()
    with pytest.raises(InvalidRequest, match="they have 2 layers"):
        pipe("a dog", references=dataclasses.replace(refs, layers=refs.layers[:2]))


@pytest.mark.parametrize(("kind", "error"), [("int8", 8e-3), ("fp8", 3e-2)])
def test_quantized_references(kind: str, error: float, tiny_folder: Path, tmp_path: Path) -> None:
    """Half the bytes of bfloat16 (here with a head dim of 16: 20 bytes instead of 64 in float32), a small error, and
    the same bits from a pack."""
    pictures = [picture(96, 64), picture(64, 64, seed=1)]
    plain = Pipeline.from_pretrained(tiny_folder)
    pipe = Pipeline.from_pretrained(tiny_folder, kv_cache_dtype=kind)
    exact, refs = plain.prefill(pictures), pipe.prefill(pictures)
    assert refs.quantization == kind
    assert refs.key != exact.key
    assert refs.nbytes * 64 == exact.nbytes * 20
    for one, other in zip(refs.layers, exact.layers, strict=True):
        for x, y in zip(one.dense(torch.float32), other.dense(torch.float32), strict=True):
            assert 0 < (x - y).norm() / y.norm() < error
            assert (
                (x - y).abs() <= y.abs().amax(-1, keepdim=True) * (0.5 / 127 if kind == "int8" else 1 / 16) * 1.001
            ).all()
    refs.save(tmp_path / "pack.safetensors")
    loaded = References.load(tmp_path / "pack.safetensors")

    def draw(**arguments: object) -> torch.Tensor:
        out = pipe("a dog", generator=generators(1)[0], output_type="pt", width=64, height=64, **arguments)
        images: torch.Tensor = out.images
        return images

    assert torch.equal(draw(references=refs), draw(references=loaded))
    assert torch.equal(draw(references=refs), draw(image=pictures))
    assert not torch.equal(draw(references=refs), draw(references=exact))
    assert (draw(references=refs) - draw(references=exact)).abs().mean() < 2e-2


def test_refuses_other_formats(tiny_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype: 'int4' is not one of None, 'int8', 'fp8'"):
        Pipeline.from_pretrained(tiny_folder, kv_cache_dtype="int4")


def test_rows_of_zeros_are_quantized() -> None:
    layer = quantize_layer(LayerKV(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8)), "int8")
    assert all(torch.equal(x, torch.zeros(1, 3, 2, 8)) for x in layer.dense(torch.float32))
