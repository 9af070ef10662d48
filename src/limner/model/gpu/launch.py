"""Whether Triton's kernels run on a device, and their launch. Triton is imported at the first launch, never before.

Triton comes with torch for CUDA and ROCm. Without it, or on a CPU, nothing here runs and nothing is imported. Tests give
`use` a copy of the kernels that Triton's interpreter runs on CPU tensors. Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

__all__ = ["Tile", "available", "interpreted", "launch", "power_of_2", "source_digest", "tile_for", "use"]

_logger = logging.getLogger("limner")
_KERNELS = "limner.model.gpu.kernels"
_SOURCE = Path(__file__).with_name("kernels.py")
_loaded: ModuleType | None = None
_interpreted = False
_digest: str | None = None
_found: dict[torch.device, bool] = {}


class Tile(NamedTuple):
    """How the attention kernel divides its work: queries and keys at a time, warps, loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


_TILES = {
    # Hopper and Blackwell of data centres multiply from shared memory: large tiles
    "large": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    # Ampere, Ada, consumer Blackwell, AMD multiply from registers, and narrow K/V are widened there
    "small": (Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
}
"""Tiles for K/V in their own dtype, and for int8 and fp8: the largest that spill no register (docs/log.md)."""


def tile_for(capability: tuple[int, int], *, narrow: bool) -> Tile:
    """Return the tile for a compute capability; `narrow`: K/V are int8 or fp8."""
    return _TILES["large" if capability[0] in (9, 10) else "small"][narrow]


def available(device: torch.device) -> bool:
    """Return True if a kernel of Triton runs there: on NVIDIA's Ampere or newer, or AMD's. Tried once in a process."""
    if _interpreted:
        return True
    if device.type != "cuda":
        return False
    found = _found.get(device)
    if found is None:
        found = _found[device] = _has_triton(device)
    return found


def _has_triton(device: torch.device) -> bool:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    x, out = torch.zeros(1, 32, device=device), torch.empty(1, 16, device=device)
    try:
        launch("gate", (1, 1), x, out, 16, 32, 16, BLOCK=16, device=device, num_warps=1)
    except Exception as problem:  # no C compiler, or one of the types of Triton's own compilers
        _logger.warning("Triton's kernels do not run on %s, torch's operators do: %s", device, problem)
        return False
    return True


def interpreted() -> bool:
    """Return True while Triton's interpreter runs the kernels."""
    return _interpreted


def use(kernels: ModuleType | None, *, interpreter: bool = False) -> None:
    """Take the kernels of another module, on tensors of any device if an interpreter runs them; None: the compiled ones."""
    global _loaded, _interpreted
    _loaded, _interpreted = kernels, interpreter


def launch(name: str, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
    """Run a kernel of `limner.model.gpu.kernels` on a device, in the current stream."""
    global _loaded
    if _loaded is None:
        _loaded = importlib.import_module(_KERNELS)
    kernel: Any = getattr(_loaded, name)
    # Triton launches on the current device, which may be another one
    place: Callable[[], Any] = contextlib.nullcontext if _interpreted else lambda: torch.cuda.device(device)
    with place():
        kernel[grid](*args, enable_fp_fusion=True, **options)


def source_digest() -> str:
    """Return a digest of the kernels' source. It is part of the content key of references."""
    global _digest
    if _digest is None:
        _digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:8]
    return _digest


def power_of_2(number: int) -> int:
    """Return the least power of 2 that is not less than a number: blocks of a kernel have such sizes."""
    return 1 << max(0, number - 1).bit_length()
