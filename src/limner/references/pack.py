"""The pack: a file that holds the tensors of References and their identity.

A pack is a safetensors file: tensors `0.k`, `0.v` (quantized ones with `0.k_scale`, `0.v_scale`), ... in the order of
the layers; of a joint model `0.tokens` alone. Its header holds the identity, with a SHA-256 of each tensor, and a
SHA-256 of the identity. The header alone says whether the tensors are those of the identity and fill the file, which is
checked before memory is taken for them. Reading copies each tensor out of the file and checks the copy, so that later
changes of the file do not matter.

Owns the file format. Does not know whether the key is that of the contents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from limner.errors import CapacityError, InvalidRequest
from limner.files import open_regular
from limner.grid import PIXELS, num_tokens
from limner.images import ReferenceReport
from limner.model.kv import KV_FORMATS, LayerKV, QuantizedLayerKV, ReferenceTokens
from limner.references.key import FORMAT

__all__ = [
    "LONGEST_HEADER",
    "MALFORMED",
    "DamagedPack",
    "PackIdentity",
    "parse_identity",
    "read_identity",
    "read_pack",
    "write_pack",
]

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""Exceptions that values of a malformed header raise."""
LONGEST_HEADER = 512 << 10
"""Bytes of the longest header that is read; those of klein-9b have 40 kB. Parsed JSON takes 25 times the text at worst."""
_LARGEST_COUNT = 2**40
_LONGEST_PREFILL = 1e6
"""Seconds; no prefill takes eleven days."""
_LONGEST_PROBLEM = 300
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


class DamagedPack(InvalidRequest):
    """A file that is no pack of this version, or was changed after it was written.

    A file that cannot be read at the moment is not damaged: that raises `InvalidRequest` itself.
    """

    def __init__(self, path: object, problem: object) -> None:
        text = str(problem).encode("utf-8", "replace").decode()
        short = text if len(text) <= _LONGEST_PROBLEM else f"{text[:_LONGEST_PROBLEM]}..."
        super().__init__("references", f"{path} {short}; make the pack again")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackIdentity:
    """The header of a pack, without its tensors."""

    key: str
    weights: str
    arithmetic: str
    dtype: torch.dtype
    quantization: str | None
    num_layers: int
    reports: tuple[ReferenceReport, ...]
    prefill_seconds: float
    shard: tuple[int, int] | None = None
    joint: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 in hex of each tensor, by name. `write_pack` computes them."""

    @property
    def kind(self) -> type[LayerKV | QuantizedLayerKV | ReferenceTokens]:
        """What the pack holds of each layer; of a joint model, tokens as one layer."""
        if self.joint:
            return ReferenceTokens
        return LayerKV if self.quantization is None else QuantizedLayerKV

    @property
    def num_tokens(self) -> int:
        return num_tokens(*(report.processed_size for report in self.reports))


# writing


def write_pack(path: Path, identity: PackIdentity, tensors: dict[str, Tensor]) -> None:
    """Write a pack to a new file, tensors in the order given. Raises `OSError`."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        tasks = {name: _digest_in(pool, tensor) for name, tensor in tensors.items()}
        digests = {name: task.result() for name, task in tasks.items()}
    text = _to_json(dataclasses.replace(identity, digests=digests))
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


def _to_json(identity: PackIdentity) -> str:
    values = {
        "format": FORMAT,
        "key": identity.key,
        "weights": identity.weights,
        "kernel": identity.arithmetic,
        "dtype": str(identity.dtype).removeprefix("torch."),
        "quantization": identity.quantization,
        "num_layers": identity.num_layers,
        "reports": [report.as_stored() for report in identity.reports],
        "digests": identity.digests,
        "prefill_seconds": identity.prefill_seconds,
        **({"shard": list(identity.shard)} if identity.shard else {}),
        **({"holds": "tokens"} if identity.joint else {}),
    }
    return json.dumps(values, sort_keys=True)


# reading


def read_pack(path: str | os.PathLike[str], *, page_locked: bool = False) -> tuple[PackIdentity, dict[str, Tensor]]:
    """Return the identity and the tensors of a pack, in host memory (`page_locked` for a GPU), every byte checked.

    Raises `InvalidRequest` for a file that cannot be read, its subclass `DamagedPack`, and `CapacityError` for a sound
    pack that does not fit in memory.
    """
    try:
        with open_regular(path) as file:
            header = _read_header(file, where=path)
            identity = header.identity(where=path)
            return identity, _read_tensors(file, header, identity, where=path, page_locked=page_locked)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_identity(path: str | os.PathLike[str]) -> PackIdentity:
    """Return the identity of a pack without reading its tensors. Raises as `read_pack` does."""
    try:
        with open_regular(path) as file:
            return _read_header(file, where=path).identity(where=path)
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_identity(head: bytes, *, nbytes: int, where: object) -> PackIdentity:
    """Return the identity from the first bytes of a pack of `nbytes` bytes; `where` names the pack in errors.

    Raises `DamagedPack`, also if the header is longer than `head`.
    """
    return _parse_header(io.BytesIO(head), size=nbytes, where=where).identity(where=where)


def _unreadable(path: object, error: OSError) -> InvalidRequest:
    return InvalidRequest("references", f"{path} cannot be read ({error.strerror or error}); check the file")


class _Header(NamedTuple):
    """The header of a safetensors file: its metadata, the entry of each tensor, and the offset of the first tensor."""

    metadata: dict[str, Any]
    tensors: dict[str, Any]
    start: int

    def identity(self, *, where: object) -> PackIdentity:
        """Return the identity in the metadata. Raises `DamagedPack`."""
        text = self.metadata.get(_HEADER)
        if not isinstance(text, str):
            raise DamagedPack(where, "is not a reference pack (limner refs pack makes one)")
        try:
            values = json.loads(text)
            if values.get("format") != FORMAT:
                raise DamagedPack(where, f"has pack format {values.get('format')}, this version reads {FORMAT}")
            if self.metadata.get(_HEADER_DIGEST) != _text_digest(text):
                raise ValueError("header: not the one that was written")
            return _identity(values)
        except DamagedPack:
            raise
        except MALFORMED as error:
            raise DamagedPack(where, f"is damaged or edited (header: {error})") from error


def _read_header(file: io.BufferedReader, *, where: object) -> _Header:
    """Raises `DamagedPack` and `OSError`."""
    return _parse_header(file, size=os.fstat(file.fileno()).st_size, where=where)


def _parse_header(file: BinaryIO, *, size: int, where: object) -> _Header:
    """Parse the header of a file of `size` bytes. Raises `DamagedPack` and `OSError`."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise DamagedPack(where, "is damaged or no safetensors file (its header ends after the file)")
    if length > LONGEST_HEADER:
        raise DamagedPack(where, f"is damaged or no pack (its header has {length} bytes, at most {LONGEST_HEADER})")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return _Header(dict(metadata), dict(header), 8 + length)
    except MALFORMED as error:
        raise DamagedPack(where, f"is damaged or no safetensors file ({error})") from error


class _Place(NamedTuple):
    """Where a tensor lies in the file, in bytes after the header, and what it is."""

    start: int
    end: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _read_tensors(
    file: io.BufferedReader, header: _Header, identity: PackIdentity, *, where: object, page_locked: bool
) -> dict[str, Tensor]:
    """Copy each tensor out of the file and check the digest of the copy. Raises `DamagedPack` and `OSError`."""
    tensors: dict[str, Tensor] = {}
    try:
        places = _places(header, identity, size=os.fstat(file.fileno()).st_size - header.start)
        file.seek(header.start)
        with ThreadPoolExecutor() as pool:
            tasks = {}
            for place in places:
                tensor = tensors[place.name] = _empty(place, where=where, page_locked=page_locked)
                if file.readinto(_bytes(tensor)) != place.end - place.start:
                    raise ValueError("the file ends early")
                tasks[place.name] = _digest_in(pool, tensor)
            wrong = [name for name, task in tasks.items() if task.result() != identity.digests[name]]
        if wrong:
            raise ValueError(f"the bytes of {', '.join(sorted(wrong)[:3])} are not those that were written")
    except MALFORMED as error:
        raise DamagedPack(where, f"is damaged or edited ({error})") from error
    return tensors


def _places(header: _Header, identity: PackIdentity, *, size: int) -> list[_Place]:
    """Return where the tensors lie, in their order in the file of `size` bytes after the header.

    They have to be those of the identity, one after the other without gaps, and to fill the file. Nothing is allocated.
    Raises one of `MALFORMED`.
    """
    fields = identity.kind._fields
    if not identity.num_layers or not identity.num_tokens:
        raise ValueError("it holds no references")
    if len(header.tensors) != identity.num_layers * len(fields):
        raise ValueError(f"{len(header.tensors)} tensors are not those of {identity.num_layers} layers")
    names = {f"{i}.{name}" for i in range(identity.num_layers) for name in fields}
    if header.tensors.keys() != names or identity.digests.keys() != names:
        raise ValueError("its tensors are not those of its identity")
    places = sorted((_place(name, entry) for name, entry in header.tensors.items()), key=lambda place: place.start)
    stored = identity.dtype if identity.quantization is None else KV_FORMATS[identity.quantization][0]
    heads = next(place.shape[2:] for place in places if place.name == f"0.{fields[0]}")  # (H, D), or (C,) of tokens
    end = 0
    for place in places:
        is_scale = place.name.endswith("_scale")
        dtype = torch.float32 if is_scale else stored
        shape = (1, identity.num_tokens, *((*heads[:-1], 1) if is_scale else heads))
        if place.shape != shape or place.dtype != dtype:
            raise ValueError(
                f"{place.name} has shape {list(place.shape)} in {place.dtype}, not {list(shape)} in {dtype}"
            )
        if place.start != end or place.end - place.start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{place.name} does not begin where the one before ends, or has another size than its shape"
            )
        end = place.end
    if end != size:
        raise ValueError("the file does not end with its last tensor")
    return places


def _place(name: str, entry: dict[str, Any]) -> _Place:
    start, end = (_count(x) for x in entry["data_offsets"])
    shape = tuple(_count(x) for x in entry["shape"])
    sides = 3 if name.endswith(".tokens") else 4
    if len(shape) != sides or 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}; it has {sides} sides of at least 1")
    return _Place(start, end, name, _CODES[entry["dtype"]], shape)


def _empty(place: _Place, *, where: object, page_locked: bool) -> Tensor:
    """Return memory for a tensor. Raises `CapacityError`."""
    try:
        return torch.empty(place.shape, dtype=place.dtype, pin_memory=page_locked)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"references: {where} needs {place.end - place.start} bytes for {place.name}, and memory has no room for them; "
            "free some, or give fewer references"
        ) from error


# values of the header: a wrong type, or a number that is not finite, raises one of `MALFORMED`


def _identity(values: dict[str, Any]) -> PackIdentity:
    if values["quantization"] not in (None, *KV_FORMATS):
        raise ValueError(f"quantization={values['quantization']!r}")
    seconds = values["prefill_seconds"]
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST_PREFILL:
        raise ValueError(f"prefill_seconds={seconds!r}")
    return PackIdentity(
        key=_text(values["key"]),
        weights=_text(values["weights"]),
        arithmetic=_text(values["kernel"]),
        dtype=_DTYPES[values["dtype"]],
        quantization=values["quantization"],
        num_layers=_count(values["num_layers"]),
        reports=tuple(_report(report) for report in values["reports"]),
        digests={_text(name): _text(digest) for name, digest in values["digests"].items()},
        prefill_seconds=float(seconds),
        shard=_shard(values.get("shard")),
        joint=_is_joint(values),
    )


def _is_joint(values: dict[str, Any]) -> bool:
    holds = values.get("holds", "kv")
    if holds not in ("kv", "tokens"):
        raise ValueError(f"holds={holds!r}")
    joint: bool = holds == "tokens"
    if joint and (values["num_layers"] != 1 or values["quantization"] is not None or values.get("shard") is not None):
        raise ValueError("tokens are one tensor, of the dtype of the arithmetic, and whole")
    return joint


def _shard(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    rank, size = (_count(x) for x in value)
    if rank >= size:
        raise ValueError(f"shard={value!r}")
    return rank, size


def _report(values: dict[str, Any]) -> ReferenceReport:
    if not isinstance(values["oriented"], bool):
        raise ValueError(f"oriented={values['oriented']!r}")
    return ReferenceReport(
        original_size=_size(values["original_size"]),
        oriented=values["oriented"],
        resized_to=None if values["resized_to"] is None else _size(values["resized_to"]),
        cut=_box(values["cut"]),
        processed_size=_size(values["processed_size"]),
        digest=_text(values["digest"]),
        added=_box(values.get("added", (0, 0, 0, 0))),
        upright_size=None if values.get("upright_size") is None else _size(values["upright_size"]),
        profile=None if values.get("profile") is None else _text(values["profile"]),
        origin=_origin(values.get("origin", (0, 0))),
    )


def _box(value: Any) -> tuple[int, int, int, int]:
    left, top, right, bottom = (_count(x) for x in value)
    return left, top, right, bottom


def _size(value: Any) -> tuple[int, int]:
    width, height = (_count(x) for x in value)
    return width, height


def _origin(value: Any) -> tuple[int, int]:
    x, y = _size(value)
    if x % PIXELS or y % PIXELS:
        raise ValueError(f"origin={value!r} is not on the grid of {PIXELS}")
    return x, y


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_COUNT:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


# digests


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data if flat.numel() else b"")


def _digest(tensor: Tensor) -> str:
    """Return the SHA-256 in hex of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _digest_in(pool: ThreadPoolExecutor, tensor: Tensor) -> Future[str]:
    """Compute a digest in a pool, or here at the end of the process, when pools take no more tasks."""
    try:
        return pool.submit(_digest, tensor)
    except RuntimeError:
        done: Future[str] = Future()
        done.set_result(_digest(tensor))
        return done


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
