"""The content key of References.

Tokens, which are kept of a joint model's references, depend on the autoencoder instead of the transformer. K/V depend
on the weights, on the ordered list of processed reference pixels and on the arithmetic (device, attention kernel and
accumulation, as `Transformer.arithmetic` names them). The key covers these, the format and, for K/V of a part of the
heads, which part it is. Knows nothing of tensors, files or stores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import torch

from limner.errors import InvalidRequest

__all__ = ["CONTENT_KEY", "FORMAT", "check_key", "reference_key"]

CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
"""Keys, and so the names of packs in a store."""
FORMAT = 3
"""The version of packs and keys. A change of either raises it, so that old packs are not found any more."""


def check_key(key: str) -> None:
    """Raise `InvalidRequest` unless a text is a content key."""
    if not CONTENT_KEY.fullmatch(key):
        raise InvalidRequest("key", f"{key!r} is not a content key (64 hexadecimal digits)")


def reference_key(
    *,
    weights: str,
    dtype: torch.dtype,
    arithmetic: str,
    digests: Sequence[str],
    quantization: str | None = None,
    shard: tuple[int, int] | None = None,
    joint: bool = False,
) -> str:
    """Return the content key: a SHA-256 in hex of everything that K/V, or tokens (`joint`), depend on.

    `digests` are those of the processed references, in their order. `shard` is (rank, size) for K/V of a part of the
    heads, None for all heads.
    """
    parts = {
        "format": FORMAT,
        "weights": weights,
        "dtype": str(dtype),
        "kernel": arithmetic,  # this name is part of every key
        "quantization": quantization,
        "references": list(digests),
        **({"shard": list(shard)} if shard else {}),
        **({"holds": "tokens"} if joint else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
