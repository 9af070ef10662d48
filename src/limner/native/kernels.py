"""Call the functions of `kernels.c` with tensors, where the CPU has AVX-512 BF16 and `limner.native.build` can build them.

No function records gradients; callers ask `runs_rows`, `runs_gate`, `runs_norm` or `runs_maps` first, which are False where
a gradient is recorded. Knows tensors and the machine, nothing of blocks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limner.native.build import Library

__all__ = [
    "ATTENTION_ARGUMENTS",
    "Segment",
    "attend",
    "call_attention",
    "gated_silu",
    "has_rows",
    "map_silu",
    "map_sums",
    "native_library",
    "norm_rope",
    "quantize_rows",
    "runs_gate",
    "runs_maps",
    "runs_norm",
    "runs_rows",
    "source_digest",
    "takes",
    "why_missing",
]

_MAX_DIM = 256
_LANES = 16
_CHUNK = 512
"""Pixels that a thread of `limner_map_sums` takes at a time; their sums are kept apart."""
_int: Any = ctypes.c_int64
_pointer: Any = ctypes.c_void_p


class Segment(NamedTuple):
    """K and V (R, H, D) that queries attend to: bfloat16, or int8 with scales (R, H, 1) float32.

    `bias` is added to the scores of these keys: the natural logarithm of their weight.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    bias: float = 0.0


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("k_row", "k_head", "v_row", "v_head")),
        *((name, ctypes.c_void_p) for name in ("k_scale", "v_scale")),
        ("num", ctypes.c_int64),
        ("bias", ctypes.c_float),
    ]


ATTENTION_ARGUMENTS = [
    _pointer,
    *[_int] * 5,
    ctypes.POINTER(_Segment),
    _int,
    ctypes.c_float,
    _pointer,
    _int,
    _int,
    _pointer,
    ctypes.c_int,
]
"""What `call_attention` gives."""


def _why_not() -> str | None:
    return None if torch.cpu._is_avx512_bf16_supported() else "the CPU has no AVX-512 BF16"


def _declare(library: ctypes.CDLL) -> None:
    library.limner_workspace.restype = _int
    library.limner_attend.argtypes = ATTENTION_ARGUMENTS
    library.limner_norm_rope.argtypes = [
        _pointer,
        *[_int] * 4,
        _pointer,
        ctypes.c_float,
        _pointer,
        _pointer,
        _int,
        _pointer,
        ctypes.c_int,
    ]
    library.limner_gated_silu.argtypes = [_pointer, *[_int] * 3, _pointer, _int, ctypes.c_int]
    library.limner_quantize_rows.argtypes = [_pointer, *[_int] * 3, _pointer, _pointer, ctypes.c_int]
    library.limner_map_sums.argtypes = [_pointer, ctypes.c_int, *[_int] * 3, _pointer, _pointer, ctypes.c_int]
    library.limner_map_silu.argtypes = [_pointer, ctypes.c_int, _int, _int, *[_pointer] * 3, ctypes.c_int]
    for name in ("attend", "norm_rope", "gated_silu", "quantize_rows", "map_sums", "map_silu"):
        getattr(library, f"limner_{name}").restype = None


_library = Library("kernels", files=("kernels.c",), missing=_why_not, declare=_declare)


def native_library() -> ctypes.CDLL | None:
    """Return the library, built if need be; None if it cannot be built or loaded, with the reason in the log."""
    return _library.loaded


def why_missing() -> str | None:
    """Return why there are no kernels here; None if there are."""
    return _library.why_missing


def source_digest() -> str:
    """Return a digest of the kernels' source, comments included. It is part of the content key of references."""
    return _library.digest


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if the attention kernel is available and supports such heads."""
    fits = dtype == torch.bfloat16 and head_dim % _LANES == 0 and head_dim <= _MAX_DIM
    return fits and device.type == "cpu" and native_library() is not None


def has_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the row kernels run there: bfloat16 on a CPU that has them."""
    return device.type == "cpu" and dtype == torch.bfloat16 and native_library() is not None


def runs_rows(x: Tensor, *others: Tensor, width: int | None = None) -> bool:
    """Return True if the row kernels take rows of `width` values, by default those of x: a multiple of 16, no gradient."""
    records = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    return (width or x.shape[-1]) % _LANES == 0 and not records and has_rows(x.device, x.dtype)


def runs_gate(x: Tensor) -> bool:
    """Return True if `gated_silu` takes x."""
    return x.shape[-1] % 2 == 0 and runs_rows(x, width=x.shape[-1] // 2)


def runs_norm(x_BSHD: Tensor, weight_D: Tensor) -> bool:
    """Return True if `norm_rope` takes x."""
    return x_BSHD.shape[-1] <= _MAX_DIM and runs_rows(x_BSHD, weight_D)


def runs_maps(x: Tensor) -> bool:
    """Return True if `map_sums` and `map_silu` take maps (B, C, h, w): channels side by side, bfloat16 or float32.

    They may be rows of larger maps. C is a multiple of 16, and no gradient is recorded.
    """
    _, channels, _, width = x.shape
    fits = channels % _LANES == 0 and x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu"
    side_by_side = x.stride()[1:] == (1, width * channels, channels)
    return fits and side_by_side and not torch.is_grad_enabled() and native_library() is not None


def attend(q_SHD: Tensor, segments: Sequence[Segment], out_SHD: Tensor) -> None:
    """softmax(q k^T / sqrt(D)) v over the keys of all segments, into `out_SHD`. K and V are not copied.

    Raises `ValueError` for shapes, dtypes and devices that do not fit.
    """
    if not takes(q_SHD.device, q_SHD.dtype, q_SHD.shape[-1]):
        raise ValueError(f"q {tuple(q_SHD.shape)} {q_SHD.dtype} on {q_SHD.device} is not for this kernel")
    library = native_library()
    assert library is not None
    call_attention(library.limner_attend, q_SHD, segments, out_SHD, space=library.limner_workspace())


def call_attention(
    function: Callable[..., None], q_SHD: Tensor, segments: Sequence[Segment], out_SHD: Tensor, *, space: int
) -> None:
    """Call an attention function in C; `space` is the bytes that it needs for a thread. Raises `ValueError`."""
    num, heads, dim = q_SHD.shape
    if out_SHD.shape != q_SHD.shape or out_SHD.dtype != q_SHD.dtype:
        raise ValueError(
            f"{tuple(out_SHD.shape)} {out_SHD.dtype} is not the place for q {tuple(q_SHD.shape)} {q_SHD.dtype}"
        )
    read = [_checked(segment, heads, dim) for segment in segments]
    if not num or not any(len(segment.k) for segment in read):
        out_SHD.zero_()
        return
    q_SHD = _last_contiguous(q_SHD)
    made = (_Segment * len(read))(
        *(
            _Segment(
                s.k.data_ptr(),
                s.v.data_ptr(),
                *s.k.stride()[:2],
                *s.v.stride()[:2],
                None if s.k_scale is None else s.k_scale.data_ptr(),
                None if s.v_scale is None else s.v_scale.data_ptr(),
                s.k.shape[0],
                s.bias * math.log2(math.e),
            )
            for s in read
        )
    )
    threads = torch.get_num_threads()
    working = torch.empty(threads * space + 64, dtype=torch.uint8)
    function(
        q_SHD.data_ptr(),
        *q_SHD.stride()[:2],
        num,
        heads,
        dim,
        made,
        len(read),
        math.log2(math.e) / math.sqrt(dim),
        out_SHD.data_ptr(),
        *out_SHD.stride()[:2],
        (working.data_ptr() + 63) // 64 * 64,
        threads,
    )


def _checked(segment: Segment, heads: int, dim: int) -> Segment:
    """Return the segment in a layout that the kernel reads. Raises `ValueError`."""
    k, v, k_scale, v_scale, bias = segment
    scaled = k_scale is not None and v_scale is not None
    dtype = torch.int8 if scaled else torch.bfloat16
    shape = (k.shape[0], heads, dim)
    if any(x.shape != shape or x.dtype != dtype or x.device.type != "cpu" for x in (k, v)):
        found = f"k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
        raise ValueError(f"{found} do not fit queries of {heads} heads of {dim} ({dtype} is read)")
    if k_scale is None or v_scale is None:
        return Segment(_last_contiguous(k), _last_contiguous(v), bias=bias)
    if any(x.shape[:2] != shape[:2] or x.numel() != k.shape[0] * heads for x in (k_scale, v_scale)):
        raise ValueError(f"scales {tuple(k_scale.shape)} and {tuple(v_scale.shape)} are not one for each key and head")
    k_scale, v_scale = (x.float().contiguous() for x in (k_scale, v_scale))
    return Segment(_last_contiguous(k), _last_contiguous(v), k_scale, v_scale, bias)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def norm_rope(x_BSHD: Tensor, weight_D: Tensor, eps: float, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """RMSNorm of each head times `weight_D`, then rotation of neighbouring pairs, (B, S, H, D). Raises `ValueError`."""
    batch, num, heads, dim = x_BSHD.shape
    if cos_SP.shape != (num, dim // 2) or sin_SP.shape != (num, dim // 2) or weight_D.shape != (dim,):
        raise ValueError(f"{num} positions of {dim} values do not fit a rotary table {tuple(cos_SP.shape)}")
    library = native_library()
    assert library is not None
    out = x_BSHD.new_empty(x_BSHD.shape)
    if x_BSHD.numel() == 0:
        return out
    x, row = _rows(x_BSHD.flatten(2))
    weight, cos_SP, sin_SP = (t.detach().float().contiguous() for t in (weight_D, cos_SP, sin_SP))
    library.limner_norm_rope(
        x.data_ptr(),
        row,
        batch * num,
        heads,
        dim,
        weight.data_ptr(),
        eps,
        cos_SP.data_ptr(),
        sin_SP.data_ptr(),
        num,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gated_silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(first half) * second half of the last axis, into `out` if given, whose rows may be parts of longer rows.

    Raises `ValueError` if `out` does not fit.
    """
    library = native_library()
    assert library is not None
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width) if out is None else out
    if out.shape != (*x.shape[:-1], width) or out.dtype != x.dtype:
        raise ValueError(f"{tuple(out.shape)} {out.dtype} is not the place for a gate over {tuple(x.shape)}")
    if x.numel() == 0:
        return out
    x, row = _rows(x)
    to, out_row = _rows(out)
    if to is not out:
        raise ValueError(f"rows of the result are not at one distance: strides {out.stride()}")
    library.limner_gated_silu(
        x.data_ptr(), row, x.numel() // (2 * width), width, out.data_ptr(), out_row, torch.get_num_threads()
    )
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) to bytes around 128, (rows, K) uint8, and the scale of each row, (rows, 1) float32."""
    library = native_library()
    assert library is not None
    width = x.shape[-1]
    num = x.numel() // width
    values, scale = x.new_empty(num, width, dtype=torch.uint8), x.new_empty(num, 1, dtype=torch.float32)
    if num:
        x, row = _rows(x)
        library.limner_quantize_rows(
            x.data_ptr(), row, num, width, values.data_ptr(), scale.data_ptr(), torch.get_num_threads()
        )
    return values, scale


def map_sums(x: Tensor) -> Tensor:
    """Return the sums of maps (B, C, h, w) over h and w, and those of their squares: (B, 2, C) float64."""
    library = native_library()
    assert library is not None
    batch, channels, height, width = x.shape
    sums = torch.empty(batch, 2, channels, dtype=torch.float64)
    space = torch.empty(-(-height * width // _CHUNK), 2, channels, dtype=torch.float64)
    for one, out in zip(x, sums, strict=True):
        library.limner_map_sums(
            one.data_ptr(),
            x.dtype == torch.float32,
            height * width,
            channels,
            _CHUNK,
            out.data_ptr(),
            space.data_ptr(),
            torch.get_num_threads(),
        )
    return sums


def map_silu(x: Tensor, scale_BC: Tensor, shift_BC: Tensor, *, out: Tensor) -> None:
    """silu(x scale + shift) of maps (B, C, h, w) in float32, rounded once, into `out`, which may be x.

    Raises `ValueError` if `out` or the factors do not fit.
    """
    library = native_library()
    assert library is not None
    batch, channels, height, width = x.shape
    factors = [t.float().contiguous() for t in (scale_BC, shift_BC)]
    if out.shape != x.shape or out.dtype != x.dtype or not (runs_maps(x) and runs_maps(out)):
        raise ValueError(f"{tuple(out.shape)} {out.dtype} is not the place for maps {tuple(x.shape)} {x.dtype}")
    if any(t.shape != (batch, channels) for t in factors):
        raise ValueError(
            f"factors {[tuple(t.shape) for t in factors]} are not one for each channel of {tuple(x.shape)}"
        )
    for i in range(batch):
        library.limner_map_silu(
            x[i].data_ptr(),
            x.dtype == torch.float32,
            height * width,
            channels,
            factors[0][i].data_ptr(),
            factors[1][i].data_ptr(),
            out[i].data_ptr(),
            torch.get_num_threads(),
        )


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x (..., K) with rows at a constant distance (a copy if need be), and that distance."""
    even = x.stride(-1) == 1 and all(
        x.shape[i] == 1 or x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2)
    )
    x = x if even else x.contiguous()
    return x, x.stride(-2) if x.dim() > 1 else x.shape[-1]
