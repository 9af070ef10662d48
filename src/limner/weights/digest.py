"""Content digests of networks: equal digests mean equal weights.

A digest covers names, dtypes, shapes and bytes of all parameters and buffers. It is kept until a tensor is replaced or
changed in place. That shows in its address and version, and, for writes that leave no trace there (`.data`), in a sample
of its values; a write that hits none of the sampled values and no version is the one thing that would be missed.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "WeightDigests", "fingerprint"]

Fingerprint = tuple[tuple[tuple[int, int], ...], bytes]


class WeightDigests:
    """Digests of networks, computed when first asked for and again after a change."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[Fingerprint, str]] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> str:
        """SHA-256 in hex of a network's tensors."""
        state = fingerprint(module)
        known = self._known.get(module)
        if known is None or known[0] != state:
            known = self._known[module] = (state, _digest(module.state_dict()))
        return known[1]


@torch.no_grad()
def fingerprint(module: nn.Module) -> Fingerprint:
    """Cheap to make, and other after a change: address, version and 8 sampled values of each tensor."""
    tensors = [t for t in module.state_dict(keep_vars=True).values() if t.numel()]
    samples = [t.reshape(-1)[:: max(1, t.numel() // 8)][:8].double() for t in tensors]
    values = hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).digest() if samples else b""
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors), values


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
