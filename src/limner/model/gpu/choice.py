"""Which kernels run on a device: the table of candidates, and how one of them is chosen.

| device | attention, best first | rows of blocks | products of int8 weights |
|---|---|---|---|
| CPU | `tiles`, `flash` (both AMX), `native`, `chunked` (`model.attention`) | C or torch | C (AMX) or oneDNN |
| Hopper (9.0) | `cudnn`, `flash3`, `triton`, `flash` | Triton | `int8`, `fp8` |
| Blackwell of data centres (10.x) | `cudnn`, `flash4`, `triton`, `flash` | Triton | `int8`, `fp8` |
| Ada (8.9), Blackwell (12.x) | `triton`, `flash`, `cudnn` | Triton | `int8`, `fp8` |
| Ampere (8.0, 8.6) | `triton`, `flash`, `cudnn` | Triton | `int8` |
| before Ampere | `efficient` | torch | `int8` where it runs |
| AMD | `flash`, `triton`, `efficient` | Triton | `int8`, `fp8` where they run |
| any CUDA, float32 | `efficient` | Triton | `int8` |
| mps, xpu | `sdpa` | torch | widened in blocks |

After all others comes `sdpa`, torch's own choice over a concatenation, which runs everywhere. Torch says which of its
kernels take a device (`torch.backends.cuda.can_use_*`). Each candidate is tried once in a process, on small inputs against
the formula; those that raise or are wrong are out, and the log says so. Of the rest the fastest runs: a later one in the
list only if it is `MARGIN` faster, so that machines of one kind choose alike. The choice is part of the content key.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limner.model.gpu import attention_triton

__all__ = ["MARGIN", "attention_candidates", "capability", "products_candidates", "rank", "relative_error", "seconds"]

_logger = logging.getLogger("limner")
MARGIN = 1.15
_HALF = (torch.float16, torch.bfloat16)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA card, (8, 0) for Ampere; None elsewhere: AMD's numbers are others."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def attention_candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return the kernels of the table that take such heads, best first; of a device that is not a CPU."""
    if device.type != "cuda":
        return ["sdpa"]
    found = [name for name in _attention_order(device, dtype) if _takes(name, device, dtype, head_dim)]
    return [*found, "sdpa"]


def _attention_order(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if dtype not in _HALF:
        return ("efficient",)
    found = capability(device)
    if found is None:
        return ("flash", "triton", "efficient")
    if found[0] in (9, 10):
        return ("cudnn", "flash3" if found[0] == 9 else "flash4", "triton", "flash", "efficient")
    return ("triton", "flash", "cudnn", "efficient")


def _takes(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a kernel says that it takes such heads."""
    if name == "triton":
        return attention_triton.takes(device, dtype, head_dim)
    backends: Any = torch.backends.cuda
    x = torch.empty(1, 2, 64, head_dim, dtype=dtype, device=device)
    params = backends.SDPAParams(x, x, x, None, 0.0, False, False)
    kind = "flash" if name.startswith("flash") else name
    return bool(getattr(backends, f"can_use_{kind}_attention")(params, False))


def products_candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the formats in which products of int8 weights may run on a device, those with the smaller error first."""
    if device.type != "cuda":
        return []
    found = capability(device)
    with_fp8 = dtype in _HALF and (found is None or found >= (8, 9)) and hasattr(torch, "_scaled_mm")
    return ["int8", "fp8"] if with_fp8 else ["int8"]


def rank(
    what: str,
    candidates: Sequence[str],
    *,
    check: Callable[[str], float],
    limit: float,
    measure: Callable[[str], float],
) -> list[str]:
    """Return the candidates whose error is at most `limit`: the fastest one, as the module describes, then the others.

    `check` returns the relative error of one, `measure` its seconds; both may raise. With one candidate left, nothing is
    measured.
    """
    right = []
    for name in candidates:
        try:
            error = check(name)
        except (RuntimeError, ValueError, TypeError, ImportError, OSError, AttributeError) as problem:
            _logger.info(
                "%s: %s does not run: %s", what, name, str(problem).splitlines()[0] if str(problem) else problem
            )
            continue
        except Exception as problem:  # the compilers of kernels have types of their own
            _logger.warning("%s: %s does not run: %s %s", what, name, type(problem).__name__, problem)
            continue
        if not error <= limit:
            _logger.warning("%s: %s is wrong here, by %.2g of the result; it is not used", what, name, error)
            continue
        right.append(name)
    if len(right) < 2:
        return right
    took = {}
    for name in right:
        try:
            took[name] = measure(name)
        except RuntimeError as problem:  # out of memory, for instance
            _logger.info("%s: %s could not be measured: %s", what, name, problem)
    best, *slower = list(took) or right[:1]
    for name in slower:
        if took[name] * MARGIN < took[best]:
            best = name
    _logger.info("%s: %s (%s)", what, best, ", ".join(f"{name} {s * 1e3:.3f} ms" for name, s in took.items()))
    return [best, *(name for name in right if name != best)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Return the shortest of five runs on a device, after two to warm up; 0 where torch has no CUDA to time it."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return 0.0
    call()
    call()
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best
