"""Products of int8 weights on a GPU, in int8 (`torch._int_mm`) or fp8 (`torch._scaled_mm`): a scale a row and a column.

Shapes: activations x (..., K), rows (M, K); a weight (N, K), its scale (N,) float32; the result (M, N). The formulas are
those of `limner.model.int8` on a CPU: the same rounding of activations to 8 bits, the same scales. Nothing is widened.

Limits of the kernels: int8 needs more than 16 rows (filled up here) and K and N that are multiples of 8, fp8 multiples of
16. Where they do not hold, `fits` is False.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limner.model.gpu import fused
from limner.model.gpu.choice import products_candidates, rank, relative_error, seconds

__all__ = [
    "FP8",
    "choose_products",
    "fits",
    "fp8_product",
    "fp8_weight",
    "int8_product",
    "quantize",
    "quantize_plain",
    "right_products",
]

FP8 = torch.float8_e4m3fn
_TOP = {torch.int8: 127.0, FP8: 448.0}
_TINY = 1e-30
_LEAST_ROWS = 32
_AT_ONCE = 64 << 20
"""int32 values of a product that are in memory at a time: 256 MiB."""
_right: dict[tuple[str, torch.dtype], tuple[str, ...]] = {}


def right_products(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the formats, "int8" and "fp8", in which products of int8 weights are right there, the one to take first.

    fp8 rounds more coarsely, so it has to be `choice.MARGIN` faster. Tried once in a process, and logged.
    """
    key = str(device), dtype
    if key not in _right:
        _right[key] = tuple(_rank(device, dtype))
    return _right[key]


def choose_products(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the first of `right_products`; None if neither is right."""
    return next(iter(right_products(device, dtype)), None)


def fits(weight: Tensor) -> bool:
    """Return True if a product with this weight (N, K), or some of its rows, has a kernel."""
    multiple = 16 if weight.dtype == FP8 else 8
    return all(size > 0 and size % multiple == 0 for size in weight.shape)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations (..., K) to rows (M, K) in int8 or fp8 and the scale of each, (M, 1) float32; in one pass on a GPU."""
    if fused.runs(x):
        return fused.quantize_int8(x) if dtype == torch.int8 else fused.quantize_fp8(x)
    return quantize_plain(x, dtype)


def quantize_plain(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `quantize`, with torch's operators."""
    rows = x.reshape(-1, x.shape[-1])
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / _TOP[dtype]).clamp(min=_TINY)
    if dtype == FP8:
        return (rows.float() / scale).clamp(-_TOP[FP8], _TOP[FP8]).to(FP8), scale
    scale = scale.bfloat16().float()  # of 8 bits, as on a CPU
    return torch.floor(rows.float() * scale.reciprocal() + 0.5).clamp_(-127, 127).to(torch.int8), scale


def fp8_weight(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 weight (N, K) and its scale to fp8 and its scale: the largest value of a row becomes 448; rows at a time."""
    narrow, scales = torch.empty(weight.shape, dtype=FP8, device=weight.device), torch.empty_like(scale)
    step = max(1, (1 << 22) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        wide = weight[part].float()
        unit = (wide.abs().amax(dim=1, keepdim=True) / _TOP[FP8]).clamp(min=_TINY)
        narrow[part] = (wide / unit).to(FP8)
        scales[part] = scale[part] * unit[:, 0]
    return narrow, scales


def int8_product(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(M, K) int8 times (N, K)^T int8, summed in int32 without rounding, times both scales, rounded once to `dtype`."""
    num, width = values.shape[0], weight.shape[0]
    out = torch.empty(num, width, dtype=dtype, device=values.device)
    step = max(_LEAST_ROWS, _AT_ONCE // width)
    for start in range(0, num, step):
        part, part_scale, place = values[start : start + step], scale[start : start + step], out[start : start + step]
        rows = part.shape[0]
        if rows < _LEAST_ROWS:
            part = torch.nn.functional.pad(part, (0, 0, 0, _LEAST_ROWS - rows))
        whole = torch._int_mm(part, weight.t())[:rows]
        if fused.runs(place, width=1):  # some columns at a time
            fused.scale_product(whole, part_scale, weight_scale, place)
        else:
            torch.mul(whole.float(), part_scale * weight_scale, out=place)
    return out


def fp8_product(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(M, K) fp8 times (N, K)^T fp8 with a scale a row and a column, in `dtype`; the kernel rounds to bfloat16."""
    product = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale[None, :].contiguous(),
        out_dtype=torch.bfloat16,
        use_fast_accum=values.device.type == "cuda",
    )
    return product.to(dtype)


def _rank(device: torch.device, dtype: torch.dtype) -> list[str]:
    dtypes = {"int8": torch.int8, "fp8": FP8}

    def case(rows: int, width: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, width, generator=generator).to(device, dtype)
        weight = torch.randint(-127, 128, (2 * width, width), generator=generator, dtype=torch.int8).to(device)
        scale = torch.rand(2 * width, generator=generator).to(device)
        return x, {"int8": (weight, scale), "fp8": fp8_weight(weight, scale)}

    def run(name: str, rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
        return (fp8_product if name == "fp8" else int8_product)(*rows, *weights, dtype=dtype)

    def check(name: str) -> float:
        x, weights = case(7, 64)
        values, scale = quantize_plain(x, dtypes[name])
        weight, weight_scale = weights[name]
        expected = (values.float() * scale) @ (weight.float() * weight_scale[:, None]).t()
        return relative_error(run(name, quantize(x, dtypes[name]), weights[name]), expected)

    def measure(name: str) -> float:
        x, weights = case(2048, 4096)
        rows = quantize(x, dtypes[name])
        return seconds(device, lambda: run(name, rows, weights[name]))

    candidates = products_candidates(device, dtype)
    with torch.no_grad():
        return rank(f"int8 weights on {device} in {dtype}", candidates, check=check, limit=2e-2, measure=measure)
