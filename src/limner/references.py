"""Reference K/V as values with an identity, and the pack file that takes them elsewhere.

Owns the content key and the file format. K/V of references depend on weights, on the ordered list of processed reference
pixels and on the arithmetic; the key covers these and nothing else. Knows nothing of prompts, pipelines or stores.

A pack is a safetensors file: tensors `0.k`, `0.v` (quantized ones with `0.k_scale`, `0.v_scale`), ... in the order of the
layers, and in its header the identity and a SHA-256 of each tensor. Loading checks all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limner.errors import InvalidRequest
from limner.images import ReferenceReport, written_beside
from limner.model.kv import KV_FORMATS, LayerKV, QuantizedLayerKV, ReferenceKV, quantize_layer

__all__ = ["PackIdentity", "References", "read_identity", "reference_key"]

_FORMAT = 2
_HEADER = "limner.references"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def reference_key(
    *, weights: str, dtype: torch.dtype, kernel: str, digests: Sequence[str], quantization: str | None = None
) -> str:
    """The content key: SHA-256 in hex of weights, arithmetic, format and the ordered digests of processed references."""
    parts = {
        "format": _FORMAT,
        "weights": weights,
        "dtype": str(dtype),
        "kernel": kernel,
        "quantization": quantization,
        "references": list(digests),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PackIdentity:
    """What the header of a pack says, without its tensors."""

    key: str
    weights: str
    kernel: str
    dtype: torch.dtype
    quantization: str | None
    num_layers: int
    reports: tuple[ReferenceReport, ...]
    digests: dict[str, str]
    prefill_seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(width * height for width, height in (r.processed_size for r in self.reports)) // 256


@dataclass(frozen=True, kw_only=True, eq=False)
class References(ReferenceKV):
    """The K/V of an ordered list of references, with their identity. Never changed after it was made.

    `key` is the content key; `weights` the digest of transformer and autoencoder that made it; `dtype` that of the
    arithmetic; `quantization` None, "int8" or "fp8"; `reports` say for each reference what was done to it;
    `prefill_seconds` is what making it took.
    """

    key: str
    weights: str
    kernel: str
    dtype: torch.dtype
    quantization: str | None = None
    reports: tuple[ReferenceReport, ...]
    prefill_seconds: float = 0.0

    @classmethod
    def make(
        cls,
        kv: ReferenceKV,
        *,
        weights: str,
        kernel: str,
        quantization: str | None,
        reports: tuple[ReferenceReport, ...],
        prefill_seconds: float = 0.0,
    ) -> References:
        """What a prefill gave, in the format in which it is kept, under its key."""
        dtype = kv.layers[0].k.dtype
        layers = kv.layers
        if quantization is not None:
            layers = tuple(quantize_layer(layer, quantization) for layer in kv.layers if isinstance(layer, LayerKV))
        digests = [report.digest for report in reports]
        return cls(
            layers=layers,
            key=reference_key(weights=weights, dtype=dtype, kernel=kernel, digests=digests, quantization=quantization),
            weights=weights,
            kernel=kernel,
            dtype=dtype,
            quantization=quantization,
            reports=reports,
            prefill_seconds=prefill_seconds,
        )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The processed size (width, height) of each reference."""
        return tuple(report.processed_size for report in self.reports)

    def to(self, device: torch.device | str) -> References:
        """The same values on a device; itself where they are there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return dataclasses.replace(self, layers=tuple(layer.to(device) for layer in self.layers))

    def pin_memory(self) -> References:
        """The same values in page-locked host memory, from which a CUDA device copies without waiting."""
        layers = tuple(type(layer)(*(x.pin_memory() for x in layer)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a pack. Raises `OutputError`."""
        tensors = {
            f"{i}.{name}": x.detach().cpu().contiguous()
            for i, layer in enumerate(self.layers)
            for name, x in layer._asdict().items()
        }
        with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
            digests = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
        identity = {
            "format": _FORMAT,
            "key": self.key,
            "weights": self.weights,
            "kernel": self.kernel,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "num_layers": len(self.layers),
            "reports": [dataclasses.asdict(report) for report in self.reports],
            "digests": digests,
            "prefill_seconds": self.prefill_seconds,
        }
        with written_beside(Path(path), failures=(OSError, SafetensorError)) as beside:
            save_file(tensors, beside, metadata={_HEADER: json.dumps(identity)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> References:
        """Reads a pack and checks every byte; a pipeline refuses it if its weights are others.

        Raises `InvalidRequest`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                identity = _identity(file.metadata(), where=path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, RuntimeError) as error:  # torch maps the file a second time
            raise InvalidRequest("references", f"{path} cannot be read ({error}); make the pack again") from error
        try:
            kind = LayerKV if identity.quantization is None else QuantizedLayerKV
            references = cls(
                layers=tuple(
                    kind(**{name: tensors[f"{i}.{name}"] for name in kind._fields}) for i in range(identity.num_layers)
                ),
                key=identity.key,
                weights=identity.weights,
                kernel=identity.kernel,
                dtype=identity.dtype,
                quantization=identity.quantization,
                reports=identity.reports,
                prefill_seconds=identity.prefill_seconds,
            )
            references.check()
            with ThreadPoolExecutor() as pool:
                found = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
            wrong = sorted(name for name in found | identity.digests if found.get(name) != identity.digests.get(name))
            if wrong:
                raise ValueError(f"the bytes of {', '.join(wrong[:3])} are not those that were written")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InvalidRequest("references", f"{path} is damaged or edited ({error}); make the pack again") from error
        return references

    def check(self) -> None:
        """Raises `ValueError` unless layers, reports and key agree with each other."""
        num_tokens = sum(width * height for width, height in self.sizes) // 256
        if not self.layers or not num_tokens:
            raise ValueError("it holds no references")
        kept = self.dtype if self.quantization is None else KV_FORMATS[self.quantization][0]
        heads, head_dim = self.layers[0].k.shape[2:]
        for layer in self.layers:
            for name, x in layer._asdict().items():
                scale = name.endswith("_scale")
                shape = (1, num_tokens, heads, 1 if scale else head_dim)
                dtype = torch.float32 if scale else kept
                if tuple(x.shape) != shape or x.dtype != dtype:
                    raise ValueError(
                        f"keys or values of shape {list(x.shape)} in {x.dtype}, not {list(shape)} in {dtype}"
                    )
        digests = [report.digest for report in self.reports]
        expected = reference_key(
            weights=self.weights,
            dtype=self.dtype,
            kernel=self.kernel,
            digests=digests,
            quantization=self.quantization,
        )
        if self.key != expected:
            raise ValueError("its key is not that of its contents")


def read_identity(path: str | os.PathLike[str]) -> PackIdentity:
    """The header of a pack; its tensors are not read. Raises `InvalidRequest`."""
    try:
        with safe_open(path, framework="pt") as file:
            return _identity(file.metadata(), where=path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InvalidRequest("references", f"{path} cannot be read ({error}); make the pack again") from error


def _identity(metadata: dict[str, str] | None, *, where: object) -> PackIdentity:
    """What a pack's header says of it. Raises `InvalidRequest` for other safetensors files and other formats."""
    text = (metadata or {}).get(_HEADER)
    if text is None:
        raise InvalidRequest("references", f"{where} is not a reference pack; make one with limner refs pack")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidRequest("references", f"{where} has a damaged header ({error}); make the pack again") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise InvalidRequest(
            "references", f"{where} has pack format {found}, this version reads {_FORMAT}; make the pack again"
        )
    try:
        if values["quantization"] not in (None, *KV_FORMATS):
            raise ValueError(f"quantization={values['quantization']!r}")
        return PackIdentity(
            key=str(values["key"]),
            weights=str(values["weights"]),
            kernel=str(values["kernel"]),
            dtype=_DTYPES[values["dtype"]],
            quantization=values["quantization"],
            num_layers=int(values["num_layers"]),
            reports=tuple(_report(report) for report in values["reports"]),
            digests=dict(values["digests"]),
            prefill_seconds=float(values["prefill_seconds"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(
            "references", f"{where} is damaged or edited (header: {error}); make the pack again"
        ) from error


def _report(values: dict[str, Any]) -> ReferenceReport:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ReferenceReport(**values)


def _digest(tensor: Tensor) -> str:
    """SHA-256 in hex of a contiguous CPU tensor's bytes."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data if flat.numel() else b"").hexdigest()
