"""Matrix products in int8: signed weights with a scale per output feature, unsigned activations with a scale per row.

Shapes: x (..., K), weight (N, K) int8, weight_scale (N,) float32, result (..., N) in the dtype of x. The weights stand for
weight * weight_scale, a row of activations for (u - 128) * scale with u in [1, 255]. Where the CPU has AMX,
`limner.native.tiles` multiplies the weights as they are stored. Where it has int8 dot products alone (AVX-512 VNNI), oneDNN
multiplies u8 x s8, and reads a copy of the weights in a layout of its own. A GPU multiplies s8 x s8, or fp8 x fp8
(`limner.model.gpu.products`), by the same formulas. Elsewhere the weights are widened and multiplied as floating point
numbers.

Activations are unsigned on a CPU because oneDNN runs s8 x s8 in a reference kernel that is a hundred times slower.
Knows nothing of blocks or files.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.model.arithmetic import Linear
from limner.model.gpu import products
from limner.native import kernels as native
from limner.native import tiles

__all__ = [
    "Int8Linear",
    "QuantizedRows",
    "has_int8_products",
    "packs_weights",
    "quantize_blocks",
    "quantize_layers",
    "quantize_rows",
    "quantize_weight",
    "settle_products",
    "tile_threads",
]

_logger = logging.getLogger("limner")
_ONEDNN = "int8 dot products"
_ZERO = 128
_TOP = 127.0
_TINY = 1e-30
_AT_ONCE = 1 << 20


class QuantizedRows(NamedTuple):
    """Activations (M, K), the scale of each row (M, 1), and the activations (..., K) before rounding.

    Values are uint8 around 128 on a CPU, int8 or fp8 on a GPU.
    """

    values: Tensor
    scale: Tensor
    source: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype


@cache
def has_int8_products() -> bool:
    """Return True if this CPU has instructions for int8 products, of oneDNN or `limner.native.tiles`; logged once."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and capability.startswith("AVX512")
        and torch.cpu._is_vnni_supported()
    )
    how = "AMX tiles" if tiles.why_missing() is None else "u8 x s8 of oneDNN"
    _logger.info("int8 on cpu (%s): %s", capability, how if found else "weights widened")
    return found


def packs_weights(*networks: nn.Module) -> bool:
    """Return True if int8 products on this CPU read a second copy of the weights, in oneDNN's layout.

    With tiles that is so only of matrices that they do not take: True if `networks` have such.
    """
    if tiles.why_missing() is not None:
        return has_int8_products()
    return any(isinstance(module, Int8Linear) and module.packs() for one in networks for module in one.modules())


def tile_threads() -> int:
    """Return how many threads have working space in products on this CPU; 0 where they are not those of tiles."""
    return torch.get_num_threads() if has_int8_products() and tiles.why_missing() is None else 0


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) to int8 (N, K) and the scale (N,) float32 of each output feature; some rows at a time.

    All rows at once would make float32 copies, 2.4 GB for the largest matrix of a 9B, and writing them takes longer than
    the arithmetic.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    step = max(1, _AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        wide = weight[rows].float()
        scale[rows] = (wide.abs().amax(dim=1) / _TOP).clamp(min=_TINY)
        values[rows] = (wide / scale[rows, None]).round().to(torch.int8)
    return values, scale


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Quantize activations (..., K), for one product or several with the same input."""
    if native.runs_rows(x):
        return QuantizedRows(*native.quantize_rows(x), x)
    rows = x.reshape(-1, x.shape[-1])
    # a scale of 8 bits is exact in bfloat16, the dtype in which products are multiplied by it
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / _TOP).clamp(min=_TINY).bfloat16().float()
    # bfloat16 may round the scale down by 1/256, which gives 127.5: clamped
    values = torch.addcmul(torch.full((), _ZERO + 0.5), rows, scale.reciprocal()).clamp_(1, 255).to(torch.uint8)
    return QuantizedRows(values, scale, x)


class _Packed(NamedTuple):
    """A weight in oneDNN's layout, and its source, held so that no other tensor gets the same address."""

    source: Tensor
    version: int
    weight: Tensor


class Int8Linear(nn.Module):
    """A `Linear` whose weight is int8. Takes activations, or the result of `prepare`."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features))
        self._packed: dict[tuple[int, int], _Packed] = {}

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Quantize a matrix."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features)
        weight, scale = quantize_weight(linear.weight.detach())
        made.weight, made.weight_scale = weight, scale
        return made

    def prepare(self, x: Tensor) -> Tensor | QuantizedRows:
        """Prepare activations that several matrices read: quantize them once."""
        product = self._product(x)
        if product is None:
            return x
        on_cpu = self._multiplies_int8(self.weight.device)
        return quantize_rows(x) if on_cpu else QuantizedRows(*products.quantize(x, self.weight.dtype), x)

    def forward(self, input: Tensor | QuantizedRows, rows: slice | None = None) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """x weight^T; with `rows` only these output features."""
        x = self.prepare(input) if isinstance(input, Tensor) else input
        if isinstance(x, Tensor):
            return F.linear(x, self._widened(rows, x.dtype))
        if x.values.dtype != torch.uint8:
            weight, scale = (w if rows is None else w[rows] for w in (self.weight, self.weight_scale))
            multiply = products.fp8_product if weight.dtype == products.FP8 else products.int8_product
            return multiply(x.values, x.scale, weight, scale, dtype=x.dtype).view(*x.shape[:-1], len(weight))
        start, stop, _ = (rows or slice(None)).indices(self.out_features)
        out_dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        if self._fits_tiles():
            whole = tiles.aligned(start, stop)
            made = self._tiled(x, whole, dtype=out_dtype)[:, start - whole.start : stop - whole.start]
            return made.to(x.dtype).contiguous().view(*x.shape[:-1], stop - start)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            x.values,
            1.0,
            _ZERO,
            self._pack(start, stop),
            self.weight_scale[start:stop],
            torch.zeros(stop - start, dtype=torch.int64),
            None,
            1.0,
            0,
            out_dtype,
            "none",
            [],
            "",
        )
        return product.mul_(x.scale.to(out_dtype)).to(x.dtype).view(*x.shape[:-1], stop - start)

    def gates(self, input: Tensor | QuantizedRows, rows: slice | None = None) -> bool:  # noqa: A002
        """Return True if `gated` runs for this result of `prepare`: bfloat16, with tiles; no hook, as of a LoRA, is set."""
        start, stop, _ = (rows or slice(None)).indices(self.out_features)
        if isinstance(input, Tensor) or input.dtype != torch.bfloat16 or input.values.dtype != torch.uint8:
            return False
        fits = self._fits_tiles() and tiles.fits(stop - start, self.in_features, gated=True)
        return fits and not (self._forward_hooks or self._forward_pre_hooks)

    def gated(self, input: QuantizedRows, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:  # noqa: A002
        """silu(first half) * second half of the product's last axis, rounded once, where `gates`.

        Into `out` (..., N / 2) if given, which may be a part of longer rows.
        """
        start, stop, _ = (rows or slice(None)).indices(self.out_features)
        if out is None:
            out = input.source.new_empty(*input.shape[:-1], (stop - start) // 2)
        flat = out.view(-1, out.shape[-1])
        self._tiled(input, slice(start, stop), dtype=input.dtype, gated=True, out=flat)
        return out

    def _tiled(self, x: QuantizedRows, rows: slice, **how: Any) -> Tensor:
        return tiles.product(x.values, self.weight[rows], scales=(x.scale, self.weight_scale[rows]), **how)

    def packs(self) -> bool:
        """Return True if products on the CPU read a copy of the weight in oneDNN's layout."""
        return self._multiplies_int8(self.weight.device) and not self._fits_tiles()

    def _fits_tiles(self) -> bool:
        """The whole matrix decides, so that none is packed for a part of its features."""
        return tiles.fits(self.out_features, self.in_features)

    def _multiplies_int8(self, device: torch.device) -> bool:
        return device.type == "cpu" and self.weight.dtype == torch.int8 and has_int8_products()

    def arithmetic_name(self, dtype: torch.dtype, *, device: torch.device | None = None) -> str:
        """Return how activations of `dtype` are multiplied, where no gradient is recorded.

        `device` is where products run, if the weight is somewhere else until then (`limner.memory.staged`).
        """
        kind = "fp8" if self.weight.dtype == products.FP8 else "int8"
        return self._product_of(dtype, device or self.weight.device) or f"{kind} widened"

    def to_fp8(self) -> None:
        """Round the weight to fp8, in place: for devices whose products in fp8 are the faster ones. It cannot be undone."""
        if self.weight.dtype == torch.int8:
            self.weight, self.weight_scale = products.fp8_weight(self.weight, self.weight_scale)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copies in oneDNN's layout made so far."""
        return sum((stop - start) * self.in_features for start, stop in self._packed)

    def unpack(self) -> None:
        """Free these copies; the next product makes them again."""
        self._packed.clear()

    def __getstate__(self) -> dict[str, object]:
        """A copy packs its weight itself: oneDNN's layout is in no pickle."""
        return {**self.__dict__, "_packed": {}}

    def _product(self, x: Tensor) -> str | None:
        """None if a gradient of x is recorded: rounding has none, so the weights are widened."""
        return None if torch.is_grad_enabled() and x.requires_grad else self._product_of(x.dtype, self.weight.device)

    def _product_of(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the name of the products that run; None: weights are widened."""
        if self._multiplies_int8(device):
            return f"int8 tiles {tiles.digest()}" if self._fits_tiles() else _ONEDNN
        if self.weight.is_meta or not products.fits(self.weight):
            return None
        kind = "fp8" if self.weight.dtype == products.FP8 else "int8"
        return f"{kind} products" if kind in products.right_products(device, dtype) else None

    def _widened(self, rows: slice | None, dtype: torch.dtype) -> Tensor:
        """The weight, or some of its rows, in `dtype`, rounded once."""
        weight, scale = (w if rows is None else w[rows] for w in (self.weight, self.weight_scale))
        wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return torch.mul(weight if weight.dtype == torch.int8 else weight.float(), scale[:, None], out=wide)

    def _pack(self, start: int, stop: int) -> Tensor:
        """Return the weight in oneDNN's layout, packed at first use and again when it changed or was replaced."""
        source = self.weight.detach()
        version = -1 if source.is_inference() else source._version
        known = self._packed.get((start, stop))
        if known is None or (known.source.data_ptr(), known.version) != (source.data_ptr(), version):
            packed = torch.ops.onednn.qlinear_prepack(source[start:stop].contiguous(), None)
            known = self._packed[start, stop] = _Packed(source, version, packed)
        return known.weight

    def _apply(self, fn: object, recurse: bool = True) -> Int8Linear:
        """As `nn.Module`, but a cast changes neither the scales nor a weight in fp8, which torch takes for a float."""
        weight, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        self.weight_scale = scale.to(self.weight.device)
        self._packed.clear()
        return self


def settle_products(network: nn.Module, dtype: torch.dtype) -> None:
    """Give int8 matrices the format in which their device multiplies fastest: once, after they are where they stay.

    `dtype` is that of activations. Where fp8 is chosen, weights are rounded to it in place, one matrix at a time.
    """
    for module in network.modules():
        if isinstance(module, Int8Linear) and module.weight.dtype == torch.int8 and module.weight.device.type == "cuda":
            fits = all(size % 16 == 0 for size in module.weight.shape)
            if fits and products.choose_products(module.weight.device, dtype) == "fp8":
                module.to_fp8()


def quantize_blocks(transformer: nn.Module) -> None:
    """Replace every matrix of the blocks by an `Int8Linear`, one at a time.

    Modulation, embedders, norms and the last layer keep their dtype: they are small, and their errors reach every token.
    """
    _replace(transformer, Linear, inside="transformer_blocks.")


def quantize_layers(text_network: nn.Module) -> None:
    """Replace every matrix of a text encoder's layers by an `Int8Linear`, one at a time; embedding and norms stay.

    Of our `Qwen3` or of transformers' class. Raises `ValueError` for a matrix with a bias, which int8 products do not add.
    """
    for name, module in text_network.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            raise ValueError(f"{name} has a bias; only matrices without one can be int8")
    _replace(text_network, nn.Linear, inside="layers.")


def _replace(network: nn.Module, kind: type[nn.Linear], *, inside: str) -> None:
    """Replace the matrices of a class whose names hold `inside`; those on the meta device get empty ones."""
    for name, module in list(network.named_modules()):
        if isinstance(module, kind) and inside in name:
            path, _, last = name.rpartition(".")
            parent = network.get_submodule(path)
            if module.weight.is_meta:
                with torch.device("meta"):
                    made = Int8Linear(module.in_features, module.out_features)
            else:
                made = Int8Linear.of(module)
            if isinstance(parent, nn.ModuleList):
                parent[int(last)] = made
            else:
                setattr(parent, last, made)
