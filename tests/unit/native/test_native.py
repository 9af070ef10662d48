"""The row kernels against their formulas in float64, over views and lengths that are no multiple of anything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.support.tiny import relative_error
from torch import nn

from limner.model.int8 import Int8Linear, quantize_rows
from limner.model.rope import apply_rope, rope_table
from limner.model.rows import NativeRows
from limner.native import kernels as native

ROUNDING = 2.5e-3
norm_rope, gated_silu = NativeRows().norm_rope, NativeRows().gated_silu
pytestmark = pytest.mark.skipif(native.native_library() is None, reason="no AVX-512 BF16 or no C compiler")


@pytest.mark.parametrize(("batch", "num", "heads", "dim"), [(1, 1, 1, 16), (2, 7, 3, 64), (3, 130, 2, 128)])
@torch.no_grad()
def test_norm_and_rotation(batch: int, num: int, heads: int, dim: int) -> None:
    x = torch.randn(batch, num, 2 * heads * dim + 8).bfloat16()[..., 3 : 3 + heads * dim].unflatten(-1, (heads, dim))
    norm = nn.RMSNorm(dim, eps=1e-6).bfloat16()
    norm.weight.copy_(torch.randn(dim))
    rope = rope_table(torch.randint(0, 50, (num, 4)), axes=(dim // 4,) * 4, theta=2000.0)
    expected = apply_rope(F.rms_norm(x.double(), (dim,), norm.weight.double(), 1e-6), rope)
    assert native.runs_rows(x)
    found = norm_rope(x, norm, rope)
    assert found.is_contiguous()
    assert relative_error(found, expected) <= ROUNDING


@torch.no_grad()
def test_gated_silu() -> None:
    x = torch.cat([torch.randn(2, 9, 96) * 4, torch.randn(2, 9, 7)], -1).bfloat16()[..., :96]
    x[0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    gate, value = x.double().chunk(2, -1)
    expected = F.silu(gate) * value
    assert relative_error(gated_silu(x), expected) <= ROUNDING
    joined = torch.full((2, 9, 60), 7.0).bfloat16()
    native.gated_silu(x, out=joined[..., 12:])
    assert relative_error(joined[..., 12:], expected) <= ROUNDING
    assert (joined[..., :12] == 7).all()


@torch.no_grad()
def test_quantized_rows_are_those_of_the_formula() -> None:
    x = torch.randn(3, 5, 64).bfloat16() * torch.tensor([1e-3, 1.0, 50.0, 0.0, 3e4])[:, None]
    found, wide = quantize_rows(x), quantize_rows(x.float())
    assert torch.equal(found.scale, wide.scale)
    # halves are rounded the other way by one of the two
    assert (found.values.int() - wide.values.int()).abs().max() <= 1
    restored = (found.values.float() - 128) * found.scale
    limit = 0.51 * found.scale.clamp(min=1e-20) + x.abs().float().reshape(15, 64) * 0.005
    assert ((restored - x.float().reshape(15, 64)).abs() <= limit).all()


@torch.no_grad()
def test_odd_widths_and_no_rows() -> None:
    """Half widths that 16 does not divide take the formula; rows of nothing give nothing."""
    for width in (16, 48):
        x = torch.randn(5, width).bfloat16()
        assert not native.runs_gate(x)
        gate, value = x.double().chunk(2, -1)
        assert relative_error(gated_silu(x), F.silu(gate) * value) <= 2 * ROUNDING
    assert gated_silu(torch.empty(2, 0, 64).bfloat16()).shape == (2, 0, 32)
    assert quantize_rows(torch.empty(2, 0, 64).bfloat16()).values.shape == (0, 64)
    wide = torch.randn(1, 3, 1, 512).bfloat16()
    norm = nn.RMSNorm(512, eps=1e-6).bfloat16()
    rope = rope_table(torch.zeros(3, 4), axes=(128,) * 4, theta=10.0)
    assert relative_error(norm_rope(wide, norm, rope), norm(wide).double()) <= 2 * ROUNDING
    with pytest.raises(ValueError, match="rotary table"):
        native.norm_rope(wide[..., :64], norm.weight[:64], 1e-6, rope.cos_SP[:2, :32], rope.sin_SP[:2, :32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_maps(dtype: torch.dtype) -> None:
    """Rows of larger maps, pixels that no chunk and no four divide, in place; threads change no bit."""
    larger = (torch.randn(2, 48, 40, 37) * 3 + 5).to(dtype).contiguous(memory_format=torch.channels_last)
    x = larger[:, :, 3:38]
    assert native.runs_maps(x)
    sums = native.map_sums(x)
    wide = x.double()
    assert relative_error(sums, torch.stack([wide.sum((2, 3)), wide.square().sum((2, 3))], dim=1)) < 1e-14
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(native.map_sums(x), sums)
    finally:
        torch.set_num_threads(threads)
    scale, shift = torch.randn(2, 48), torch.randn(2, 48)
    expected = F.silu(wide * scale[:, :, None, None].double() + shift[:, :, None, None].double())
    out = torch.empty_like(x)
    native.map_silu(x, scale, shift, out=out)
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else ROUNDING)
    before = larger.clone()
    native.map_silu(x, scale, shift, out=x)
    assert torch.equal(x, out)
    assert torch.equal(larger[:, :, :3], before[:, :, :3])
    assert torch.equal(larger[:, :, 38:], before[:, :, 38:])


@torch.no_grad()
def test_maps_that_do_not_fit() -> None:
    x = torch.randn(1, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    for other in (x.contiguous(), x[:, :24], x[..., :4], x.half(), x[:, :, :, ::2]):
        assert not native.runs_maps(other)
    with torch.enable_grad():
        assert not native.runs_maps(x)
    factors = torch.ones(1, 32)
    with pytest.raises(ValueError, match="not the place"):
        native.map_silu(x, factors, factors, out=torch.empty(1, 32, 6, 5))
    with pytest.raises(ValueError, match="one for each channel"):
        native.map_silu(x, factors, torch.ones(32), out=x)
    x[0, 3, 2, 2] = float("nan")
    assert native.map_sums(x).isnan().sum() == 2
    native.map_silu(x, factors, factors, out=x)
    assert x.isnan().sum() == 1


@torch.no_grad()
def test_nan_is_handed_on() -> None:
    x = torch.randn(4, 32).bfloat16()
    x[1, 5] = float("nan")
    assert gated_silu(x).isnan().sum() == 1
    assert quantize_rows(x).scale.isnan().flatten().tolist() == [False, True, False, False]
    product = Int8Linear.of(nn.Linear(32, 16, bias=False))(x)
    assert product.isnan().all(-1).tolist() == [False, True, False, False]


def test_training_takes_the_formula() -> None:
    x = torch.randn(1, 4, 32).bfloat16().requires_grad_()
    assert not native.runs_rows(x)
    gated_silu(x).sum().backward()
    assert x.grad is not None
    norm, heads = nn.RMSNorm(32).bfloat16(), torch.randn(1, 4, 1, 32).bfloat16()
    rope = rope_table(torch.zeros(4, 4), axes=(8,) * 4, theta=10.0)
    norm_rope(heads, norm, rope).sum().backward()
    assert norm.weight.grad is not None


def test_gradients_through_int8_are_those_of_the_widened_weights() -> None:
    linear = nn.Linear(32, 16, bias=False)
    narrow = Int8Linear.of(linear)
    x = torch.randn(6, 32, requires_grad=True)
    (narrow(narrow.prepare(x)) * torch.arange(16.0)).sum().backward()
    expected = (torch.arange(16.0) @ linear.weight.detach()).expand(6, -1)
    assert x.grad is not None
    assert relative_error(x.grad, expected) < 0.02
