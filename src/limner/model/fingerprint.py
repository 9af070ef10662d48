"""Name all that decides the last bits of a result besides the weights: device, attention kernel, products, processes.

The name is part of the content key of references: K/V of one arithmetic are never used by another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from limner.model.arithmetic import Linear
from limner.model.attention import choose_kernel
from limner.model.context import Execution
from limner.model.gpu.launch import source_digest as triton_digest
from limner.model.int8 import Int8Linear
from limner.model.rows import rows_name
from limner.native.kernels import source_digest as native_digest
from limner.native.tiles import digest as tiles_digest

__all__ = ["arithmetic_name"]


def arithmetic_name(network: nn.Module, execution: Execution, *, like: Linear, head_dim: int) -> str:
    """Return the name for a network whose matrices have the device, dtype and arithmetic of `like`."""
    device, dtype = like.weight.device, like.weight.dtype
    kernel = execution.kernel or choose_kernel(device, dtype, head_dim)
    digests: dict[str, Callable[[], str]] = {"native": native_digest, "tiles": tiles_digest, "triton": triton_digest}
    kernel = f"{kernel} {digests[kernel]()}" if kernel in digests else kernel
    names = [device.type, kernel, like.arithmetic_name(device), *_narrowed_float32(device)]
    matrices = [module for module in network.modules() if isinstance(module, Int8Linear)]
    int8 = {module.arithmetic_name(dtype, device=device) for module in matrices}
    rows = rows_name(device, dtype)
    names += [rows] if rows else []
    names += sorted(int8)
    return "/".join([*names, *execution.ranks.arithmetic])


def _narrowed_float32(device: torch.device) -> list[str]:
    """Name the settings by which torch rounds inputs of float32 products and convolutions there, to tf32 or bf16."""
    backends = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}
    if device.type not in backends:
        return []
    convolutions = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    found = {"products": backends[device.type].matmul, "convolutions": convolutions.conv}
    precisions = {name: settings.fp32_precision for name, settings in found.items()}
    return [f"{kind} {name}" for name, kind in precisions.items() if kind not in ("none", "ieee")]
