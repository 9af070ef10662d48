"""Reference K/V as values with an identity, and the pack file that takes them elsewhere.

Owns the content key and the file format. K/V of references depend on weights, on the ordered list of processed reference
pixels and on the arithmetic; the key covers these and nothing else, but for K/V of a part of the heads, which part it is.
Knows nothing of prompts, pipelines or stores.

A pack is a safetensors file: tensors `0.k`, `0.v` (quantized ones with `0.k_scale`, `0.v_scale`), ... in the order of the
layers, and in its header the identity, which holds a SHA-256 of each tensor, and a SHA-256 of the identity. Loading copies
each tensor out of the file and checks the copy: what was checked cannot change with the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.files import atomic_write
from limner.images import ReferenceReport
from limner.model.kv import KV_FORMATS, LayerKV, QuantizedLayerKV, ReferenceKV, quantize_layer

__all__ = [
    "CONTENT_KEY",
    "DamagedPack",
    "PackIdentity",
    "References",
    "check_key",
    "parse_identity",
    "read_identity",
    "reference_key",
    "write_pack",
]

CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
"""What keys look like, and so the names of packs in a store."""
_FORMAT = 3
_HEADER = "limner.references"
_HEADER_DIGEST = "limner.references.sha256"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Names of dtypes in a safetensors header."""
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)


class DamagedPack(InvalidRequest):
    """A file that is no pack of this version, or not the one that was written; one that cannot be read may be whole."""

    def __init__(self, path: object, problem: object) -> None:
        super().__init__("references", f"{path} {problem}; make the pack again")


def check_key(key: str) -> None:
    """Raises `InvalidRequest` for what cannot be a content key."""
    if not CONTENT_KEY.fullmatch(key):
        raise InvalidRequest("key", f"{key!r} is not a content key (64 hexadecimal digits)")


def reference_key(
    *,
    weights: str,
    dtype: torch.dtype,
    kernel: str,
    digests: Sequence[str],
    quantization: str | None = None,
    shard: tuple[int, int] | None = None,
) -> str:
    """The content key: SHA-256 in hex of weights, arithmetic, format and the ordered digests of processed references.

    `shard` (rank, size) is for K/V of a part of the heads, None for those of all.
    """
    parts = {
        "format": _FORMAT,
        "weights": weights,
        "dtype": str(dtype),
        "kernel": kernel,
        "quantization": quantization,
        "references": list(digests),
        **({"shard": list(shard)} if shard else {}),
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
    shard: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(width * height for width, height in (r.processed_size for r in self.reports)) // 256


@dataclass(frozen=True, kw_only=True, eq=False)
class References(ReferenceKV):
    """The K/V of an ordered list of references, with their identity. Never changed after it was made.

    `key` is the content key; `weights` the digest of transformer and autoencoder that made it; `dtype` that of the
    arithmetic; `quantization` None, "int8" or "fp8"; `reports` say for each reference what was done to it;
    `prefill_seconds` is what making it took. `shard` None has all heads; (rank, size) has one of `size` equal parts of
    them, in their order, as a process of a tensor parallel model keeps it.
    """

    key: str
    weights: str
    kernel: str
    dtype: torch.dtype
    quantization: str | None = None
    reports: tuple[ReferenceReport, ...]
    prefill_seconds: float = 0.0
    shard: tuple[int, int] | None = None

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
        shard: tuple[int, int] | None = None,
    ) -> References:
        """What a prefill gave, in the format in which it is kept, under its key."""
        dtype = kv.layers[0].k.dtype
        layers = kv.layers
        if quantization is not None:
            layers = tuple(quantize_layer(layer, quantization) for layer in kv.layers if isinstance(layer, LayerKV))
        digests = [report.digest for report in reports]
        return cls(
            layers=layers,
            key=reference_key(
                weights=weights, dtype=dtype, kernel=kernel, digests=digests, quantization=quantization, shard=shard
            ),
            weights=weights,
            kernel=kernel,
            dtype=dtype,
            quantization=quantization,
            reports=reports,
            prefill_seconds=prefill_seconds,
            shard=shard,
        )

    def part(self, rank: int, size: int) -> References:
        """The K/V of part `rank` of `size` of the heads, under a key of their own; copies. Raises `InvalidRequest`."""
        num_heads = self.layers[0].k.shape[2]
        if self.shard is not None or num_heads % size:
            held = "all" if self.shard is None else f"part {self.shard[0]} of {self.shard[1]}"
            raise InvalidRequest(
                "references", f"{num_heads} heads ({held}) cannot be cut into {size} parts; prefill the pictures again"
            )
        layers = tuple(type(layer)(*(x.chunk(size, dim=2)[rank].contiguous() for x in layer)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, shard=(rank, size), key=self._key((rank, size)))

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

    def to_host(self, *, page_locked: bool) -> References:
        """The same values in host memory; page-locked, a CUDA device copies from there without waiting."""

        def copy(x: Tensor) -> Tensor:
            return torch.empty_like(x, device="cpu", pin_memory=page_locked).copy_(x)

        return dataclasses.replace(self, layers=tuple(type(layer)(*map(copy, layer)) for layer in self.layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a pack. Raises `OutputError`."""
        with atomic_write(Path(path)) as beside:
            write_pack(self, beside)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> References:
        """Reads a pack and checks every byte; a pipeline refuses it if its weights are others.

        Raises `InvalidRequest`, for what is damaged or no pack its subclass `DamagedPack`.
        """
        try:
            with open(path, "rb") as file:
                header = _read_header(file, where=path)
                identity = header.identity(where=path)
                tensors = _read_tensors(file, header, identity, where=path)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            kind = LayerKV if identity.quantization is None else QuantizedLayerKV
            if len(tensors) != identity.num_layers * len(kind._fields):
                raise ValueError(f"{len(tensors)} tensors are not those of {identity.num_layers} layers")
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
                shard=identity.shard,
            )
            references.check()
        except _MALFORMED as error:
            raise DamagedPack(path, f"is damaged or edited ({error})") from error
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
        if self.key != self._key(self.shard):
            raise ValueError("its key is not that of its contents")

    def _key(self, shard: tuple[int, int] | None) -> str:
        """The content key of what this is made of, with all heads or a part of them."""
        return reference_key(
            weights=self.weights,
            dtype=self.dtype,
            kernel=self.kernel,
            digests=[report.digest for report in self.reports],
            quantization=self.quantization,
            shard=shard,
        )


def write_pack(references: References, path: Path) -> None:
    """Writes the bytes of a pack to a new file. Raises `OSError`."""
    tensors = {
        f"{i}.{name}": x.detach().cpu().contiguous()
        for i, layer in enumerate(references.layers)
        for name, x in layer._asdict().items()
    }
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        made = {name: _digest_in(pool, tensor) for name, tensor in tensors.items()}
        digests = {name: future.result() for name, future in made.items()}
    identity = {
        "format": _FORMAT,
        "key": references.key,
        "weights": references.weights,
        "kernel": references.kernel,
        "dtype": str(references.dtype).removeprefix("torch."),
        "quantization": references.quantization,
        "num_layers": len(references.layers),
        "reports": [dataclasses.asdict(report) for report in references.reports],
        "digests": digests,
        "prefill_seconds": references.prefill_seconds,
        **({"shard": list(references.shard)} if references.shard else {}),
    }
    text = json.dumps(identity, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {_HEADER: text, _HEADER_DIGEST: _text_digest(text)}}
    codes, start = {dtype: code for code, dtype in _CODES.items()}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def read_identity(path: str | os.PathLike[str]) -> PackIdentity:
    """The header of a pack; its tensors are not read. Raises as `References.load` does."""
    try:
        with open(path, "rb") as file:
            return _read_header(file, where=path).identity(where=path)
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_identity(head: bytes, *, nbytes: int, where: object) -> PackIdentity:
    """What the first bytes of a pack of `nbytes` say. Raises `DamagedPack`, also where they do not have the header."""
    return _parse_header(io.BytesIO(head), size=nbytes, where=where).identity(where=where)


def _unreadable(path: object, error: OSError) -> InvalidRequest:
    return InvalidRequest("references", f"{path} cannot be read ({error.strerror or error}); check the file")


class _Header(NamedTuple):
    """The header of a safetensors file: its metadata, what it says of each tensor, and where their bytes start."""

    metadata: dict[str, Any]
    tensors: dict[str, Any]
    start: int

    def identity(self, *, where: object) -> PackIdentity:
        """What the header says of a pack. Raises `DamagedPack`."""
        text = self.metadata.get(_HEADER)
        if not isinstance(text, str):
            raise DamagedPack(where, "is not a reference pack (limner refs pack makes one)")
        try:
            values = json.loads(text)
            if values.get("format") != _FORMAT:
                raise DamagedPack(where, f"has pack format {values.get('format')}, this version reads {_FORMAT}")
            if self.metadata.get(_HEADER_DIGEST) != _text_digest(text):
                raise ValueError("header: not the one that was written")
            return _identity(values)
        except DamagedPack:
            raise
        except _MALFORMED as error:
            raise DamagedPack(where, f"is damaged or edited (header: {error})") from error


def _read_header(file: io.BufferedReader, *, where: object) -> _Header:
    """Raises `DamagedPack` and `OSError`."""
    return _parse_header(file, size=os.fstat(file.fileno()).st_size, where=where)


def _parse_header(file: BinaryIO, *, size: int, where: object) -> _Header:
    """The header of a file of `size` bytes. Raises `DamagedPack` and `OSError`."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise DamagedPack(where, "is damaged or no safetensors file (its header ends after the file)")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return _Header(dict(metadata), dict(header), 8 + length)
    except _MALFORMED as error:
        raise DamagedPack(where, f"is damaged or no safetensors file ({error})") from error


def _read_tensors(
    file: io.BufferedReader, header: _Header, identity: PackIdentity, *, where: object
) -> dict[str, Tensor]:
    """Each tensor in memory of its own, its digest checked there. Raises `DamagedPack` and `OSError`."""
    size = os.fstat(file.fileno()).st_size - header.start
    tensors: dict[str, Tensor] = {}
    try:
        if header.tensors.keys() != identity.digests.keys():
            raise ValueError("its tensors are not those of its identity")
        if max(_whole(entry["data_offsets"][1]) for entry in header.tensors.values()) != size:
            raise ValueError("the file does not end with its last tensor")
        with ThreadPoolExecutor() as pool:
            found = {}
            for name, entry in header.tensors.items():
                start, end = (_whole(x) for x in entry["data_offsets"])
                dtype, shape = _CODES[entry["dtype"]], [_whole(x) for x in entry["shape"]]
                if not end - start == math.prod(shape) * dtype.itemsize or end > size:
                    raise ValueError(f"{name} is not within the file")
                tensors[name] = torch.empty(shape, dtype=dtype)
                file.seek(header.start + start)
                if file.readinto(_bytes(tensors[name])) != end - start:
                    raise ValueError("the file ends early")
                found[name] = _digest_in(pool, tensors[name])
            wrong = [name for name, future in found.items() if future.result() != identity.digests[name]]
        if wrong:
            raise ValueError(f"the bytes of {', '.join(sorted(wrong)[:3])} are not those that were written")
    except _MALFORMED as error:
        raise DamagedPack(where, f"is damaged or edited ({error})") from error
    return tensors


def _identity(values: dict[str, Any]) -> PackIdentity:
    """Raises one of `_MALFORMED` for values of other types, and for numbers that are not finite."""
    if values["quantization"] not in (None, *KV_FORMATS):
        raise ValueError(f"quantization={values['quantization']!r}")
    seconds = values["prefill_seconds"]
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"prefill_seconds={seconds!r}")
    return PackIdentity(
        key=_text(values["key"]),
        weights=_text(values["weights"]),
        kernel=_text(values["kernel"]),
        dtype=_DTYPES[values["dtype"]],
        quantization=values["quantization"],
        num_layers=_whole(values["num_layers"]),
        reports=tuple(_report(report) for report in values["reports"]),
        digests={_text(name): _text(digest) for name, digest in values["digests"].items()},
        prefill_seconds=float(seconds),
        shard=_shard(values.get("shard")),
    )


def _shard(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    rank, size = (_whole(x) for x in value)
    if rank >= size:
        raise ValueError(f"shard={value!r}")
    return rank, size


def _report(values: dict[str, Any]) -> ReferenceReport:
    if not isinstance(values["oriented"], bool):
        raise ValueError(f"oriented={values['oriented']!r}")
    left, top, right, bottom = (_whole(x) for x in values["cut"])
    return ReferenceReport(
        original_size=_size(values["original_size"]),
        oriented=values["oriented"],
        resized_to=None if values["resized_to"] is None else _size(values["resized_to"]),
        cut=(left, top, right, bottom),
        processed_size=_size(values["processed_size"]),
        digest=_text(values["digest"]),
    )


def _size(value: Any) -> tuple[int, int]:
    width, height = (_whole(x) for x in value)
    return width, height


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data if flat.numel() else b"")


def _digest(tensor: Tensor) -> str:
    """SHA-256 in hex of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _digest_in(pool: ThreadPoolExecutor, tensor: Tensor) -> Future[str]:
    """A digest that a pool computes; computed here where the interpreter ends, and pools take nothing more."""
    try:
        return pool.submit(_digest, tensor)
    except RuntimeError:
        done: Future[str] = Future()
        done.set_result(_digest(tensor))
        return done


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
