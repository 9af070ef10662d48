"""Content digests of networks: equal digests mean equal weights.

A digest covers names, dtypes, shapes and bytes of all parameters and buffers. It is kept until a tensor is replaced or
changed in place, which tensor versions tell.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["WeightDigests"]


class WeightDigests:
    """Digests of networks, computed when first asked for and again after a change."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], ...], str]] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> str:
        """SHA-256 in hex of a network's tensors."""
        tensors = module.state_dict(keep_vars=True)
        state = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors.values())
        known = self._known.get(module)
        if known is None or known[0] != state:
            known = self._known[module] = (state, _digest(tensors))
        return known[1]


def _digest(tensors: dict[str, Tensor]) -> str:
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        parts = pool.map(_digest_tensor, tensors.values())
        total = hashlib.sha256()
        for name, part in zip(tensors, parts, strict=True):
            total.update(f"{name}\0".encode() + part)
    return total.hexdigest()


def _digest_tensor(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\0".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
