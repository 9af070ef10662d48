"""int8 weights and activations: the product, the transformer, a saved model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.native import has_tiles, without_tiles
from tests.support.tiny import generators, make_transformer, picture

import limner.model.int8 as int8
from limner import CheckpointError, InvalidRequest, OutputError, Pipeline
from limner.config import TransformerConfig
from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear, quantize_blocks, quantize_rows, quantize_weight
from limner.model.transformer import Transformer
from limner.native import tiles
from limner.tokens import image_ids, reference_ids, text_ids
from limner.weights.convert import save_quantized
from limner.weights.folder import load_transformer


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def test_quantized_values_are_within_half_a_step() -> None:
    weight = torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    values, scale = quantize_weight(weight)
    assert ((values * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    x = torch.randn(3, 5, 64)
    x[0, 0] = 0
    x[1, 2, 7] = 1000  # an outlier costs its own row alone
    rows = quantize_rows(x)
    assert rows.values.dtype == torch.uint8
    wide = ((rows.values.float() - 128) * rows.scale).view_as(x)
    error = (wide - x).abs().view(15, 64)
    # half a step, and at the end of the range the scale's rounding to 8 bits (half a step more)
    assert (error <= rows.scale * 1.0001).all()
    assert (error.mean(1) <= rows.scale[:, 0] * 0.35).all()
    assert wide[0, 0].abs().max() == 0


@pytest.fixture(params=[pytest.param("tiles", marks=has_tiles), "oneDNN"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways in which a CPU multiplies int8."""
    if not int8.has_int8_products():
        pytest.skip("this CPU has no int8 dot products")
    if request.param == "oneDNN":
        without_tiles(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [pytest.param("tiles", marks=has_tiles), "oneDNN", "widened"])
def test_product(dtype: torch.dtype, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions = products != "widened"
    if instructions and not int8.has_int8_products():
        pytest.skip("this CPU has no int8 dot products")
    monkeypatch.setattr(int8, "has_int8_products", lambda: instructions)
    if products == "oneDNN":
        without_tiles(monkeypatch)
    linear = Linear(256, 192).to(dtype)
    made, x = Int8Linear.of(linear), torch.randn(2, 33, 256).to(dtype)
    expected = x.float() @ linear.weight.float().t()
    assert relative_error(made(x), expected) < (1.5e-2 if instructions else 1e-2)
    assert made(x).dtype == dtype
    assert made(x).shape == (2, 33, 192)
    prepared = made.prepare(x)
    assert torch.equal(made(prepared), made(x))
    for rows in (slice(64, 192), slice(40, 100), slice(None, 7), slice(191, None)):
        part = made(x, rows)
        assert relative_error(part, made(x)[..., rows]) < (1e-6 if products == "widened" else 1e-30)
        assert part.is_contiguous()
    assert (made.packed_bytes > 0) == made.packs() == (products == "oneDNN")


def test_matrices_that_tiles_do_not_take(how: str) -> None:
    """Features or widths that their blocks do not divide: oneDNN multiplies a packed copy, and the name says so."""
    for width, features, fits in ((64, 96, True), (64, 40, False), (72, 64, False)):
        made, x = Int8Linear.of(Linear(width, features)), torch.randn(5, width)
        assert relative_error(made(x), x @ (made.weight * made.weight_scale[:, None]).t()) < 1.5e-2
        by_tiles = how == "tiles" and fits
        assert made.packs() == (made.packed_bytes > 0) == (not by_tiles)
        name = f"int8 tiles {tiles.digest()}" if by_tiles else "int8 dot products"
        assert made.arithmetic_name(torch.float32) == name


def test_what_this_cpu_does(how: str) -> None:
    assert int8.packs_weights() == (how == "oneDNN")
    assert int8.tile_threads() == (torch.get_num_threads() if how == "tiles" else 0)


def test_a_changed_weight_is_packed_again(how: str) -> None:
    made, x = Int8Linear.of(Linear(64, 32)), torch.randn(4, 64)
    before = made(x)
    with torch.no_grad():
        made.weight.neg_()
    assert torch.allclose(made(x), -before, atol=1e-6)


@pytest.mark.parametrize("change", ["replaced", "loaded", "data"])
def test_another_weight_is_packed_again(change: str, how: str) -> None:
    """Its version may be that of the old one."""
    made, other, x = Int8Linear.of(Linear(64, 32)), Int8Linear.of(Linear(64, 32)), torch.randn(4, 64)
    before, expected = made(x), other(x)
    if change == "replaced":
        made.weight, made.weight_scale = other.weight, other.weight_scale
    elif change == "loaded":
        made.load_state_dict(other.state_dict(), assign=True)
    else:
        made.weight.data, made.weight_scale.data = other.weight, other.weight_scale
    assert torch.equal(made(x), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()  # else a gradient is recorded, and the weights are widened
def test_velocity_with_int8(dtype: torch.dtype, how: str) -> None:
    """Relative error of one velocity, random weights, references included, against float32."""
    theirs = make_transformer(64, double=2, single=4)
    exact = Transformer(TransformerConfig.from_diffusers(theirs.config))
    exact.load_state_dict(theirs.state_dict())
    ours = Transformer(exact.config)
    ours.load_state_dict(theirs.state_dict())
    ours = ours.to(dtype)
    quantize_blocks(ours)
    assert sum(isinstance(m, Int8Linear) for m in ours.modules()) == 2 * 12 + 4 * 2
    assert ours.quantization == "int8"
    assert (f"int8 tiles {tiles.digest()}" if how == "tiles" else "int8 dot products") in ours.arithmetic.split("/")
    img, txt, ref = torch.randn(2, 35, 16), torch.randn(2, 40, 48), torch.randn(1, 44, 16)
    ids = {"img_ids": image_ids((5, 7)), "txt_ids": text_ids(40)}
    found, expected = (
        model(
            img.to(model.dtype),
            txt.to(model.dtype),
            0.7,
            **ids,
            references=model.prefill(ref.to(model.dtype), reference_ids([(4, 6), (5, 4)])),
        )
        for model in (ours, exact)
    )
    copies = [m.packed_bytes for m in ours.modules() if isinstance(m, Int8Linear)]
    assert any(copies) == (how == "oneDNN")
    assert 0 < relative_error(found, expected) < 6e-2  # narrow layers (width 128); the benchmark has klein's widths


def test_some_rows_at_a_time_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 64)
    whole = quantize_weight(weight)
    monkeypatch.setattr("limner.model.int8._AT_ONCE", 5 * 64)
    for part, expected in zip(quantize_weight(weight), whole, strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(whole[1], weight.abs().amax(dim=1) / 127)


def test_casting_keeps_scales_in_float32() -> None:
    made = Int8Linear.of(Linear(64, 32)).to(torch.bfloat16)
    assert (made.weight.dtype, made.weight_scale.dtype) == (torch.int8, torch.float32)


def test_saved_model_is_the_quantized_model(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    quantized = load_transformer(tiny_folder / "transformer", dtype=None, device=torch.device("cpu"), quantize="int8")
    save_quantized(quantized, tiny_folder, target)
    pipes = [Pipeline.from_pretrained(tiny_folder, quantize="int8"), Pipeline.from_pretrained(target)]
    arguments = {"prompt": "a dog", "image": picture(64, 64), "output_type": "pt", "width": 64, "height": 64}
    pictures = [pipe(**arguments, generator=generators(1)[0]).images for pipe in pipes]
    assert torch.equal(*pictures)
    assert pipes[0].reference_weights == pipes[1].reference_weights
    plain = Pipeline.from_pretrained(tiny_folder)
    assert plain.reference_weights != pipes[0].reference_weights  # kept K/V of one are never used by the other
    assert not torch.equal(plain(**arguments, generator=generators(1)[0]).images, pictures[0])
    narrow = Pipeline.from_pretrained(target, dtype=torch.bfloat16)
    assert {m.weight_scale.dtype for m in narrow.transformer.modules() if isinstance(m, Int8Linear)} == {torch.float32}
    with pytest.raises(OutputError, match="give a new folder"):
        save_quantized(quantized, tiny_folder, target)


def test_refuses_other_quantizations(tiny_copy: Path) -> None:
    with pytest.raises(InvalidRequest, match="quantize: 'int4' is not one of None, 'int8'"):
        Pipeline.from_pretrained(tiny_copy, quantize="int4")
    file = tiny_copy / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CheckpointError, match="quantization 'bitsandbytes' is not supported"):
        Pipeline.from_pretrained(tiny_copy)
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "limner_int8"}}))
    with pytest.raises(CheckpointError, match="says int8, the weights are not"):
        Pipeline.from_pretrained(tiny_copy)
