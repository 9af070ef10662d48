"""Builds and loads `kernels.c` where the CPU and a C compiler allow it; gives its functions to tensors.

The library is compiled once, when first used (2 seconds), into `$XDG_CACHE_HOME/limner` under a name that holds the
digest of the source and the compiler, and shares the OpenMP threads of torch. Without a compiler, or with
LIMNER_NATIVE=0, everything runs without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Segment",
    "attend",
    "gated_silu",
    "has_rows",
    "native_library",
    "norm_rope",
    "quantize_rows",
    "runs_rows",
    "takes",
]

_logger = logging.getLogger("limner")
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-std=c11", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
_MAX_DIM = 256
_int: Any = ctypes.c_int64
_pointer: Any = ctypes.c_void_p


class Segment(NamedTuple):
    """K and V (R, H, D) that queries attend to: bfloat16, or int8 with scales (R, H, 1) float32."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("k_row", "k_head", "v_row", "v_head")),
        *((name, ctypes.c_void_p) for name in ("k_scale", "v_scale")),
        ("num", ctypes.c_int64),
    ]  # fmt: skip


@cache
def native_library() -> ctypes.CDLL | None:
    """The library, built if need be; None where it cannot be, with the reason in the log."""
    reason = _missing()
    if reason is None:
        try:
            path = _built()
            library = ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", "") or ""
            reason = f"{error} {output}".strip()
        else:
            _declare(library)
            _logger.info("native kernels: %s", path)
            return library
    _logger.info("no native kernels: %s", reason)
    return None


def _missing() -> str | None:
    if os.environ.get("LIMNER_NATIVE") == "0":
        return "LIMNER_NATIVE is 0"
    if sys.platform != "linux" or not torch.cpu._is_avx512_bf16_supported():
        return "the CPU has no AVX-512 BF16, or the system is not Linux"
    if _compiler() is None:
        return "there is no C compiler (CC, cc, gcc or clang)"
    return None


def _compiler() -> list[str] | None:
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return [found] if found else None


def _built() -> Path:
    """The file of the library: built beside and renamed, so that processes that start at once do not meet half of one."""
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode()])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limner"
    path = folder / f"native-{digest}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / path.name
            command = [*compiler, *_FLAGS, "-shared", "-o", str(made), str(_SOURCE)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=120)
            os.replace(made, path)
    return path


def _declare(library: ctypes.CDLL) -> None:
    library.limner_attend.argtypes = [
        _pointer, *[_int] * 5, ctypes.POINTER(_Segment), _int, ctypes.c_float, _pointer, _int, _int, ctypes.c_int,
    ]  # fmt: skip
    library.limner_norm_rope.argtypes = [
        _pointer, *[_int] * 4, _pointer, ctypes.c_float, _pointer, _pointer, _int, _pointer, ctypes.c_int,
    ]  # fmt: skip
    library.limner_gated_silu.argtypes = [_pointer, *[_int] * 3, _pointer, _int, ctypes.c_int]
    library.limner_quantize_rows.argtypes = [_pointer, *[_int] * 3, _pointer, _pointer, ctypes.c_int]
    for name in ("attend", "norm_rope", "gated_silu", "quantize_rows"):
        getattr(library, f"limner_{name}").restype = None


def has_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the row kernels run there: bfloat16 on a CPU that has them."""
    return device.type == "cpu" and dtype == torch.bfloat16 and native_library() is not None


def runs_rows(x: Tensor) -> bool:
    """Whether the row kernels take this tensor: rows of a multiple of 16, and no gradient."""
    records = torch.is_grad_enabled() and x.requires_grad
    return x.shape[-1] % 16 == 0 and not records and has_rows(x.device, x.dtype)


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel is for such heads."""
    return dtype == torch.bfloat16 and head_dim % 16 == 0 and head_dim <= _MAX_DIM


def attend(q_SHD: Tensor, segments: Sequence[Segment], out_SHD: Tensor) -> None:
    """softmax(q k^T / sqrt(D)) v over the keys of all segments, into `out_SHD`. K and V are read where they are."""
    library = native_library()
    assert library is not None
    num, heads, dim = q_SHD.shape
    q_SHD = _last_contiguous(q_SHD)
    read = [Segment(_last_contiguous(s.k), _last_contiguous(s.v), *_scales(s)) for s in segments]
    made = (_Segment * len(read))(
        *(
            _Segment(
                s.k.data_ptr(), s.v.data_ptr(), *s.k.stride()[:2], *s.v.stride()[:2],
                None if s.k_scale is None else s.k_scale.data_ptr(),
                None if s.v_scale is None else s.v_scale.data_ptr(), s.k.shape[0],
            )
            for s in read
        )
    )  # fmt: skip
    library.limner_attend(
        q_SHD.data_ptr(), *q_SHD.stride()[:2], num, heads, dim, made, len(read), math.log2(math.e) / math.sqrt(dim),
        out_SHD.data_ptr(), *out_SHD.stride()[:2], torch.get_num_threads(),
    )  # fmt: skip


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _scales(segment: Segment) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if segment.k_scale is None or segment.v_scale is None:
        return None, None
    return segment.k_scale.contiguous(), segment.v_scale.contiguous()


def norm_rope(x_BSHD: Tensor, weight_D: Tensor, eps: float, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """RMSNorm of each head times `weight_D`, then rotation of neighbouring pairs, (B, S, H, D)."""
    library = native_library()
    assert library is not None
    batch, num, heads, dim = x_BSHD.shape
    x, row = _rows(x_BSHD.flatten(2))
    out = x_BSHD.new_empty(x_BSHD.shape)
    weight, cos_SP, sin_SP = (t.detach().float().contiguous() for t in (weight_D, cos_SP, sin_SP))
    library.limner_norm_rope(
        x.data_ptr(), row, batch * num, heads, dim, weight.data_ptr(), eps, cos_SP.data_ptr(), sin_SP.data_ptr(), num,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(first half) * second half of the last axis, into `out` if given: its rows may be parts of longer ones."""
    library = native_library()
    assert library is not None
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width) if out is None else out
    x, row = _rows(x)
    _, out_row = _rows(out, copies=False)
    library.limner_gated_silu(
        x.data_ptr(), row, x.numel() // (2 * width), width, out.data_ptr(), out_row, torch.get_num_threads()
    )
    return out


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) to bytes around 128, (rows, K) uint8, and the scale of each, (rows, 1) float32."""
    library = native_library()
    assert library is not None
    width = x.shape[-1]
    x, row = _rows(x)
    num = x.numel() // width
    values, scale = x.new_empty(num, width, dtype=torch.uint8), x.new_empty(num, 1, dtype=torch.float32)
    library.limner_quantize_rows(
        x.data_ptr(), row, num, width, values.data_ptr(), scale.data_ptr(), torch.get_num_threads()
    )
    return values, scale


def _rows(x: Tensor, *, copies: bool = True) -> tuple[Tensor, int]:
    """A tensor (..., K) whose rows lie at one distance, and that distance."""
    row = x.stride(-2) if x.dim() > 1 else x.shape[-1]
    even = x.stride(-1) == 1 and all(
        x.shape[i] == 1 or x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2)
    )
    if even:
        return x, row
    assert copies, "rows at one distance are wanted"
    return x.contiguous(), x.shape[-1]
