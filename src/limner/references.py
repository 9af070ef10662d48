"""Reference K/V as values with an identity, and the store that keeps them.

Owns the content key, the pack file and the memory budget. K/V of references depend on weights, on the ordered list of
processed reference pixels and on the arithmetic; the key covers these and nothing else. Knows nothing of prompts,
pipelines or requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from limner.errors import InvalidRequest
from limner.images import ReferenceReport, write_beside
from limner.model.layers import LayerKV
from limner.model.transformer import ReferenceKV

__all__ = ["ReferenceStore", "References", "reference_key"]

_FORMAT = 1


def reference_key(*, weights: str, dtype: torch.dtype, kernel: str, digests: Sequence[str]) -> str:
    """The content key: SHA-256 in hex of weights, arithmetic and the ordered digests of processed references."""
    parts = {"format": _FORMAT, "weights": weights, "dtype": str(dtype), "kernel": kernel, "references": list(digests)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class References(ReferenceKV):
    """The K/V of an ordered list of references, with their identity. Never changed after it was made.

    `key` is the content key; `weights` the digest of transformer and autoencoder that made it; `reports` say for each
    reference what was done to it.
    """

    key: str
    weights: str
    kernel: str
    reports: tuple[ReferenceReport, ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The processed size (width, height) of each reference."""
        return tuple(report.processed_size for report in self.reports)

    def to(self, device: torch.device | str) -> References:
        """The same values on a device; itself where they are there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return dataclasses.replace(self, layers=tuple(LayerKV(k.to(device), v.to(device)) for k, v in self.layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a pack: safetensors, with the identity in its header. Raises `OutputError`."""
        tensors = {}
        for i, layer in enumerate(self.layers):
            tensors[f"{i}.k"], tensors[f"{i}.v"] = (x.detach().cpu().contiguous() for x in layer)
        identity = {
            "format": _FORMAT,
            "key": self.key,
            "weights": self.weights,
            "kernel": self.kernel,
            "num_layers": len(self.layers),
            "reports": [dataclasses.asdict(report) for report in self.reports],
        }
        write_beside(Path(path), serialize(tensors, metadata={"limner.references": json.dumps(identity)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> References:
        """Reads a pack; a pipeline refuses it if its weights are others. Raises `InvalidRequest`."""
        try:
            with safe_open(path, framework="pt") as file:
                identity = _identity(file.metadata(), where=path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise InvalidRequest("references", f"{path} cannot be read ({error}); make the pack again") from error
        try:
            references = cls(
                layers=tuple(LayerKV(tensors[f"{i}.k"], tensors[f"{i}.v"]) for i in range(identity["num_layers"])),
                key=identity["key"],
                weights=identity["weights"],
                kernel=identity["kernel"],
                reports=tuple(_report(values) for values in identity["reports"]),
            )
            references.check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InvalidRequest("references", f"{path} is damaged or edited ({error}); make the pack again") from error
        return references

    def check(self) -> None:
        """Raises `ValueError` unless layers, reports and key agree with each other."""
        num_tokens = sum(width * height for width, height in self.sizes) // 256
        if not self.layers or not num_tokens:
            raise ValueError("it holds no references")
        shape = (1, num_tokens, *self.layers[0].k.shape[2:])
        for x in (x for layer in self.layers for x in layer):
            if x.dim() != 4 or tuple(x.shape) != shape or x.dtype != self.dtype:
                raise ValueError(
                    f"keys or values of shape {list(x.shape)} in {x.dtype}, not {list(shape)} in {self.dtype}"
                )
        digests = [report.digest for report in self.reports]
        if self.key != reference_key(weights=self.weights, dtype=self.dtype, kernel=self.kernel, digests=digests):
            raise ValueError("its key is not that of its contents")


def _identity(metadata: dict[str, str] | None, *, where: object) -> dict[str, Any]:
    """What a pack's header says of it. Raises `InvalidRequest` for other safetensors files and other formats."""
    text = (metadata or {}).get("limner.references")
    if text is None:
        raise InvalidRequest("references", f"{where} is not a reference pack; make one with References.save")
    try:
        identity = json.loads(text)
    except ValueError as error:
        raise InvalidRequest("references", f"{where} has a damaged header ({error}); make the pack again") from error
    if not isinstance(identity, dict) or identity.get("format") != _FORMAT:
        found = identity.get("format") if isinstance(identity, dict) else None
        raise InvalidRequest(
            "references", f"{where} has pack format {found}, this version reads {_FORMAT}; make the pack again"
        )
    return identity


def _report(values: dict[str, Any]) -> ReferenceReport:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ReferenceReport(**values)


class ReferenceStore:
    """Keeps References by key, up to `memory_bytes`; the least recently used goes first. Safe to share by threads.

    They stay on the device that made them.
    """

    def __init__(self, *, memory_bytes: int = 2 << 30) -> None:
        if memory_bytes < 0:
            raise InvalidRequest("memory_bytes", f"{memory_bytes} is not a budget; use 0 (keep nothing) or more")
        self._budget = memory_bytes
        self._entries: OrderedDict[str, References] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], References]) -> tuple[References, bool]:
        """The References of a key, made if they are not here, and whether they were."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key], True
        made = make()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = made
                self._nbytes += made.nbytes
            while self._nbytes > self._budget:
                self._nbytes -= self._entries.popitem(last=False)[1].nbytes
        return made, False

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries
