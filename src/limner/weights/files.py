"""Files of tensors: read their headers and single tensors, and write them with one tensor in memory at a time.

Tensors of safetensors files are memory-mapped, so reading one copies nothing. Pickles are never opened. Knows no names of
any network.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from limner.errors import CheckpointError
from limner.files import open_regular
from limner.weights.bounds import check_json

__all__ = [
    "DTYPES",
    "PICKLES",
    "VALUES_AT_ONCE",
    "WIDE",
    "SafetensorsFile",
    "ShardedFile",
    "TensorFile",
    "TensorInfo",
    "check_regular",
    "dtype_name",
    "is_pickle",
    "open_folder",
    "read_json",
    "some_names",
    "variants_of",
    "write_tensors",
]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read, by their names in safetensors."""
WIDE = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that are not quantized."""
VALUES_AT_ONCE = 1 << 22
"""Values that are widened at a time: 16 MiB of float32."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64}
_ALIGNED = 64
_logger = logging.getLogger("limner")
_open: Callable[..., Any] = safe_open  # its methods have no types
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Suffixes of files that hold pickles."""
_ZIP = b"PK\x03\x04"
_MAX_JSON = 4 << 20
"""Bytes of a configuration or an index of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor in a header: dtype by the format's own name ("BF16", "Q4_K"), shape, bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class TensorFile(ABC):
    """Tensors by name. `path` is for messages, `files` are on disk, `headers` are the texts in the header of each."""

    path: Path
    files: tuple[Path, ...]
    infos: Mapping[str, TensorInfo]
    headers: tuple[Mapping[str, str], ...]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the header of a single file; those of shards are none of the whole's."""
        return self.headers[0] if len(self.headers) == 1 else {}

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored, memory-mapped where the format allows."""


def _unreadable(path: Path, error: BaseException) -> str:
    """Return what to say of a file that is no safetensors: by its name it should be one, or it is something else."""
    if path.suffix.lower() in (".safetensors", ".sft"):
        return f"cannot be read ({error}); it is truncated or damaged, download it again"
    return "is no file of weights that Limner reads; give a .safetensors or .gguf file, or a model's folder"


class SafetensorsFile(TensorFile):
    """One safetensors file. It stays mapped while it or one of its tensors is in use."""

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path, self.files = path, (path,)
        try:
            self._file = _open(path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)
            self.infos = {name: _info(s.get_dtype(), s.get_shape()) for name, s in slices.items()}
            self.headers = (self._file.metadata() or {},)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {_unreadable(path, error)}") from error

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read ({error}); download the file again") from error
        return tensor


class ShardedFile(TensorFile):
    """Several safetensors files with an index of which tensor is in which. The index is not trusted."""

    def __init__(self, index: Path) -> None:
        self.path = index.parent
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map; download it again")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: names {name!r}; shards have to be .safetensors files beside it")
        names = sorted(set(weight_map.values()))
        if absent := [name for name in names if not (index.parent / name).exists()]:
            single = index.parent / f"{index.name.partition('.safetensors')[0]}.safetensors"
            instead = f", or remove the index, and {single.name} is read" if single.is_file() else ""
            raise CheckpointError(
                f"{index}: {some_names('lists shards that are not there:', absent)}download what is missing{instead}"
            )
        shards = [SafetensorsFile(index.parent / name) for name in names]
        self.files = tuple(shard.path for shard in shards)
        self._home = {name: shard for shard in shards for name in shard.infos}
        self.infos = {name: shard.infos[name] for name, shard in self._home.items()}
        self.headers = tuple(header for shard in shards for header in shard.headers)
        if weight_map.keys() != self.infos.keys():
            lost, extra = weight_map.keys() - self.infos.keys(), self.infos.keys() - weight_map.keys()
            raise CheckpointError(
                f"{index}: {some_names('lists but the shards lack', lost)}{some_names('lacks', extra)}"
            )

    def read(self, name: str) -> Tensor:
        return self._home[name].read(name)


def open_folder(folder: Path, stem: str, *, variant: str | None = None, shards_first: bool = True) -> TensorFile:
    """Open the weights of a folder: `stem`.safetensors, or the shards that its index names.

    Where both are there, `shards_first` says which is read, and a line of the log does. With a `variant` that is read if
    the folder has it, else the plain weights, and a line of the log says so. Raises `CheckpointError`.
    """
    for kind in dict.fromkeys((variant, None)):
        index, single = folder / _index_name(stem, kind), folder / f"{_with(stem, kind)}.safetensors"
        has_index, has_single = index.is_file(), single.is_file()
        if not (has_index or has_single):
            continue
        if kind != variant:
            _logger.info("%s: has no variant %r, %s is read", folder, variant, (index if has_index else single).name)
        sharded = has_index and (shards_first or not has_single)
        if has_index and has_single:
            used, left = (index, single) if sharded else (single, index)
            _logger.warning(
                "%s: has shards and a single file; %s is read, as the original libraries do, not %s",
                folder,
                used.name,
                left.name,
            )
        return ShardedFile(index) if sharded else SafetensorsFile(single)
    raise CheckpointError(f"{folder}: has no {_with(stem, variant)}.safetensors{_hint(folder, stem)}")


def variants_of(folder: Path, stem: str) -> list[str]:
    """Return the variants of the weights in a folder, as "fp16" of `stem`.fp16.safetensors; the plain ones are none."""
    single = re.compile(rf"{re.escape(stem)}\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors")
    index = re.compile(rf"{re.escape(stem)}\.safetensors\.index\.([\w-]+)\.json")
    names = [path.name for path in folder.glob(f"{stem}.*")]
    return sorted({match[1] for name in names for match in (single.fullmatch(name), index.fullmatch(name)) if match})


def _with(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}" if variant else stem


def _index_name(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def _hint(folder: Path, stem: str) -> str:
    """Return what the folder has instead of the weights that were looked for."""
    if variants := variants_of(folder, stem):
        return (
            f", but {' and '.join(variants)} variants; give variant={variants[0]!r} to from_pretrained "
            f"(--variant {variants[0]})"
        )
    others = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    return f"; {others[0]} is a pickle and is not read, convert it to safetensors" if others else ""


def check_regular(path: Path) -> None:
    """Refuse anything but a readable file, and pickles under any name. Raises `CheckpointError`."""
    try:
        pickled = is_pickle(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the name") from error
    if pickled:
        raise CheckpointError(
            f"{path}: is a pickle, which can run code when it is read, and is not read; use the .safetensors file of the "
            "same weights, or convert it with a tool that you trust"
        )


def is_pickle(path: Path) -> bool:
    """Return True for a pickle, by suffix or by content. Raises `OSError`, also for anything but a regular file.

    A pickle of protocol 2 or later starts with 0x80 and the protocol, torch's newer ones are zip archives. The length of a
    safetensors header may start with the same bytes; then the header is within the file and starts with a brace.
    """
    with open_regular(path) as file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
    if path.suffix.lower() in PICKLES:
        return True
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return False
    return start.startswith(_ZIP) or (start[:1] == b"\x80" and start[1:2] < b"\x10")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `CheckpointError`, also where a key names code to run."""
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise CheckpointError(
                f"{path}: has over {_MAX_JSON} bytes, too many for a configuration; download it again"
            )
        value = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is the checkpoint complete?") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: has to hold a JSON object, not {type(value).__name__}")
    check_json(value, where=path)
    return value


def some_names(what: str, names: Iterable[str]) -> str:
    """Return the first names of a set for a message, "" if there are none."""
    shown = sorted(names)
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"{what} {', '.join(shown[:4])}{more}; " if shown else ""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors."""
    return _NAMES[dtype]


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]], *, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose tensors come one at a time, in any order.

    The library's writer takes all of them at once, and a dequantized model may not fit in memory. Wide dtypes come first,
    as in the library's files. The data start at a multiple of 64 bytes, since the last bits of matrix products depend on
    the alignment of mapped weights. Raises `OSError`.
    """
    order = sorted(infos, key=lambda name: (-DTYPES[infos[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    starts, end = {}, 0
    for name in order:
        starts[name], end = end, end + infos[name].nbytes
        header[name] = {
            "dtype": infos[name].dtype,
            "shape": list(infos[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected = infos[name]
            assert (dtype_name(tensor.dtype), tuple(tensor.shape)) == (expected.dtype, expected.shape), name
            file.seek(8 + len(text) + starts.pop(name))
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert not starts, f"not written: {list(starts)}"
        file.flush()
        os.fsync(file.fileno())
        if os.fstat(file.fileno()).st_size != 8 + len(text) + end:
            raise OSError(errno.EIO, "was not written whole")


def _info(dtype: str, shape: Sequence[int]) -> TensorInfo:
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_BITS.get(dtype, 8)
    return TensorInfo(dtype=dtype, shape=tuple(shape), nbytes=math.prod(shape) * bits // 8)
