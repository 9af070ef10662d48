"""Call the functions of `tiles.c` and `tile_attention.c` with tensors, where the CPU has AMX and `limner.native.build` can
build them: products in int8 and bfloat16, and attention in bfloat16.

Shapes of products: x (M, K), weight (N, K), result (M, N). Both are bfloat16; or x is uint8 around 128 with a scale for
each row (M, 1) float32, and weight int8 with a scale for each feature (N,) float32. Weights are read as they are stored,
also a part of the rows of a larger one. Records no gradients. Knows tensors and the machine, nothing of blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from limner.native.build import Library
from limner.native.kernels import ATTENTION_ARGUMENTS, Segment, call_attention

__all__ = ["aligned", "attend", "digest", "fits", "has_amx", "product", "takes", "why_missing"]

_BLOCK = 32
_LINE = 64
_MAX_DIM = 256
_TOO_WIDE = 1 << 17
"""Sums of so many values of a row may not have room in 32 bits."""
_DTYPES = (torch.bfloat16, torch.float32)
_pointer, _int = ctypes.c_void_p, ctypes.c_int64


def has_amx() -> bool:
    """Return True if this CPU has tiles for int8 and bfloat16, as far as torch can tell."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch that is allowed
    return all(found.get(name) for name in ("amx_int8", "amx_bf16", "avx512_bf16"))


def _why_not() -> str | None:
    return None if has_amx() else "the CPU has no AMX, or this torch cannot tell"


def _declare(library: ctypes.CDLL) -> None:
    library.limner_tiles_space.restype = _int
    library.limner_tiles_space.argtypes = [_int, _int, ctypes.c_int, ctypes.c_int]
    library.limner_tiles_product.restype = None
    library.limner_tiles_product.argtypes = [
        *(_pointer, _int, _pointer),
        *(_pointer, _int, _pointer, _int),
        *(_pointer, _int, ctypes.c_int),
        *(_int, _int, _int),
        *(_pointer, ctypes.c_int),
    ]
    library.limner_tiles_attend.restype = None
    library.limner_tiles_attend.argtypes = ATTENTION_ARGUMENTS
    library.limner_tiles_attention_space.restype = _int
    library.limner_tiles_attention_space.argtypes = [_int]
    if library.limner_tiles_ask() != 0:
        raise OSError("the system does not give this process AMX tiles")


_library = Library(
    "tiles",
    files=("tiles.h", "tiles.c", "tile_attention.c"),
    flags=("-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    missing=_why_not,
    declare=_declare,
)


def why_missing() -> str | None:
    """Return why nothing here runs on this machine; None if it does."""
    return _library.why_missing


def digest() -> str:
    """Return a digest of the source, comments included. It is part of the content key of references."""
    return _library.digest


def fits(num: int, width: int, *, gated: bool = False) -> bool:
    """Return True if products of weights (N, K) run here: `num` is a multiple of 32, if gated of 64, and `width` of 64."""
    block = 2 * _BLOCK if gated else _BLOCK
    return num > 0 and num % block == 0 and 0 < width < _TOO_WIDE and width % _LINE == 0 and _library.loaded is not None


def aligned(start: int, stop: int) -> slice:
    """Return the least range of features around this one, of a matrix that fits, for which products run."""
    return slice(start // _BLOCK * _BLOCK, -(-stop // _BLOCK) * _BLOCK)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x weight^T in `dtype`, bfloat16 or float32, (M, N), rounded once; `scales` are those of int8, of x and weight.

    `gated`: silu(first half of the features) * second half, (M, N / 2), in bfloat16; N is a multiple of 64. `out` is the
    place for the result, whose rows may be parts of longer rows. Raises `ValueError` for what does not fit.
    """
    (rows, width), num = x.shape, weight.shape[0]
    shape = (rows, num // 2 if gated else num)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    _check(x, weight, scales, out, dtype=dtype, shape=shape, gated=gated)
    library = _library.loaded
    assert library is not None
    if rows == 0:
        return out
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    x_scale, weight_scale = (t.float().contiguous() for t in scales) if scales else (None, None)
    threads, itemsize = torch.get_num_threads(), weight.itemsize
    size = library.limner_tiles_space(rows, width * itemsize, scales is None, threads)
    space = torch.empty(size + _LINE, dtype=torch.uint8)
    library.limner_tiles_product(
        *(x.data_ptr(), x.stride(0) * itemsize, _address(x_scale)),
        *(weight.data_ptr(), weight.stride(0) * itemsize, _address(weight_scale), num // 2 if gated else 0),
        *(out.data_ptr(), out.stride(0), dtype == torch.float32),
        *(rows, num, width * itemsize),
        *((space.data_ptr() + _LINE - 1) // _LINE * _LINE, threads),
    )
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    out: Tensor,
    *,
    dtype: torch.dtype,
    shape: tuple[int, int],
    gated: bool,
) -> None:
    """Raise `ValueError` for operands and a result of which `product` would read or write what is not theirs."""
    rows, num = x.shape[0], weight.shape[0]
    found = [fits(num, x.shape[1], gated=gated), weight.shape[1] == x.shape[1]]
    if scales is None:
        found += [x.dtype == weight.dtype == torch.bfloat16]
    else:
        found += [x.dtype == torch.uint8, weight.dtype == torch.int8]
        found += [scales[0].numel() == rows, scales[1].shape == (num,)]
    found += [all(t.device.type == "cpu" for t in (x, weight, out, *(scales or ())))]
    found += [dtype == torch.bfloat16 if gated else dtype in _DTYPES]
    found += [out.shape == shape, out.dtype == dtype]
    found += [rows == 0 or out.stride(1) == 1, rows < 2 or out.stride(0) >= shape[1]]
    if not all(found):
        x_, weight_, out_ = (f"{tuple(t.shape)} {t.dtype}" for t in (x, weight, out))
        with_ = [f"{tuple(t.shape)} {t.dtype}" for t in scales or ()]
        raise ValueError(
            f"x {x_}, weight {weight_}, scales {with_} and result {out_} are not for this product (gated: {gated})"
        )


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if `attend` is available and supports such heads: bfloat16, a multiple of 32 up to 256."""
    shaped = head_dim % _BLOCK == 0 and 0 < head_dim <= _MAX_DIM
    return shaped and dtype == torch.bfloat16 and device.type == "cpu" and _library.loaded is not None


def attend(q_SHD: Tensor, segments: Sequence[Segment], out_SHD: Tensor) -> None:
    """softmax(q k^T / sqrt(D)) v over the keys of all segments, into `out_SHD`. K and V are not copied.

    Raises `ValueError` for shapes, dtypes and devices that do not fit.
    """
    if not takes(q_SHD.device, q_SHD.dtype, q_SHD.shape[-1]):
        raise ValueError(f"q {tuple(q_SHD.shape)} {q_SHD.dtype} on {q_SHD.device} is not for this kernel")
    library = _library.loaded
    assert library is not None
    space = library.limner_tiles_attention_space(q_SHD.shape[-1])
    call_attention(library.limner_tiles_attend, q_SHD, segments, out_SHD, space=space)
