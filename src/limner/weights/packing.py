"""How a weight is stored when it is not stored wide: the formats that are read, and how a file says which one it is.

A marker says it: a tensor `<layer>.comfy_quant` that holds JSON, or `_quantization_metadata` in the header. Without one,
dtypes and shapes do, where they are enough. What could be read in two ways is refused, as are rotations that are not
undone. Reads markers, no weights; `unpack` has the arithmetic.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from limner.errors import CheckpointError
from limner.weights.bounds import check_json
from limner.weights.files import DTYPES, TensorFile, TensorInfo

__all__ = ["FORMATS", "Format", "Packing", "is_extra", "packings_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A way to store matrices in few bits.

    `name` is its name in `limner inspect`, `marks` are the names that markers have for it, `dtype` that of the values.
    `stored` and `read` say in words what is in a file and what becomes of it. `error` bounds what is lost of a matrix of
    normally distributed values that comfy-kitchen stored so and that is read in bfloat16 or as int8: the norm of the
    difference by that of the matrix. None: it depends on the size of the values.
    """

    name: str
    marks: tuple[str, ...]
    dtype: tuple[str, ...]
    stored: str
    read: str
    error: float | None


_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALED = "value x scale in float32, rounded once"
FORMATS: tuple[Format, ...] = (
    Format(
        name="fp8",
        marks=("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise"),
        dtype=_FP8,
        stored="F8 with `weight_scale` or `scale_weight`, one number or one a row",
        read=_SCALED,
        error=0.03,
    ),
    Format(
        name="fp8_blocks",
        marks=("float8_e4m3fn_blockwise",),
        dtype=_FP8,
        stored="F8 with `weight_scale_inv` or `weight_scale`, one number for a square, 128 x 128 in Qwen3's FP8",
        read=_SCALED,
        error=0.03,
    ),
    Format(
        name="fp8_raw",
        marks=(),
        dtype=_FP8,
        stored="F8, no scale anywhere in the file",
        read="the values as they are; values that reach half of F8's range show that scales were lost, and are refused",
        error=None,
    ),
    Format(
        name="int8",
        marks=(),
        dtype=("I8",),
        stored="I8 with a flat `weight_scale`, one a row, no marker: what `limner quantize` writes",
        read="as stored, memory-mapped",
        error=0.015,
    ),
    Format(
        name="int8_tensorwise",
        marks=("int8_tensorwise",),
        dtype=("I8",),
        stored="I8 with `weight_scale`, one number or one a row",
        read=f'{_SCALED}; with `quantize="int8"` as stored',
        error=0.015,
    ),
    Format(
        name="int8_convrot",
        marks=(),
        dtype=("I8",),
        stored="int8_tensorwise whose marker says `convrot`: rows are rotated in groups of `convrot_groupsize`",
        read="value x scale in float32, times the Hadamard matrix that undoes the rotation, rounded once",
        error=0.015,
    ),
    Format(
        name="int8_blocks",
        marks=("int8_blockwise",),
        dtype=("I8",),
        stored="I8 with `weight_scale`, one number for a square",
        read=_SCALED,
        error=0.015,
    ),
    Format(
        name="mxfp8",
        marks=("mxfp8",),
        dtype=("F8_E4M3",),
        stored="F8_E4M3 with a power of two for 32 columns, in tiles of 128 x 4; needs its marker",
        read=_SCALED,
        error=0.03,
    ),
    Format(
        name="nvfp4",
        marks=("nvfp4",),
        dtype=("U8",),
        stored="two values a byte, the even column in the high half, an F8 scale for 16 columns in tiles of 128 x 4, one "
        "`weight_scale_2`; needs its marker",
        read=_SCALED,
        error=0.1,
    ),
)
"""The formats that are read, besides GGUF's."""
_BY_MARK = {mark: one.name for one in FORMATS for mark in one.marks}
_DTYPES = {one.name: one.dtype for one in FORMATS}
_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
_SECOND = "weight_scale_2"
_UNUSED = ("input_scale", "scale_input", "comfy_quant")
_WIDE_SCALES = ("F32", "F16", "BF16")
_MARKER, _HEADER = "comfy_quant", "_quantization_metadata"
_MAX_MARKER = 1 << 16
"""Bytes of a marker; those that are written have under 200."""
_ABOUT = frozenset(
    (
        *("format", "convrot", "convrot_groupsize", "group_size", "block_size", "orig_shape"),
        *("full_precision_matrix_mult", "orig_dtype", "per_row", "per_channel", "is_weight", "version"),
    )
)
"""What a marker may say: the first line changes how weights are read, the second does not. Anything else is refused."""
_ROTATED = re.compile(r"convrot|quarot|spinquant|hadamard|(?<![a-z])quip(?![a-z])", re.IGNORECASE)
_GROUPS = (4, 16, 64, 256, 1024, 4096)
"""Sizes of a rotation: powers of four, whose Hadamard matrix is regular."""
_SIDES = tuple(1 << n for n in range(4, 11))
"""Sides of squares with one scale."""
_TILE = (128, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How one weight is stored. `shape` is that of the weight, `dtype` that of its stored values.

    `scale` and `second` are names of tensors beside it; `group` is the number of columns with one scale (0: the whole
    row), `side` that of a square (0: none), `rotation` the size of the groups that were rotated (0: none).
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: str | None = None
    second: str | None = None
    group: int = 0
    side: int = 0
    rotation: int = 0

    @property
    def is_int8(self) -> bool:
        """True if the stored values times one scale a row are the weight."""
        return self.format in ("int8", "int8_tensorwise")

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of the scales."""
        return tuple(name for name in (self.scale, self.second) if name)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """What a marker says of a layer; `where` is its name for messages."""

    format: str
    rotation: int
    side: int
    shape: tuple[int, ...] | None
    where: str


def is_extra(name: str) -> bool:
    """Return True for what a quantization stores besides weights and their scales: markers, scales of activations."""
    return name.rpartition(".")[2] in _UNUSED or name == "scaled_fp8"


def packings_of(file: TensorFile, own: Mapping[str, TensorInfo], prefix: str) -> dict[str, Packing]:
    """Return how the narrow weights of a part are stored, by name without prefix.

    `own` are the part's tensors in the file. Raises `CheckpointError` for what would be read wrongly.
    """
    reader = _Reader(file, own, prefix)
    found = {}
    for name in own:
        is_scale = name.rpartition(".")[2] in (*_SCALES, _SECOND) and _weight_of(name) in own
        if not (is_scale or is_extra(name)) and (packing := reader.packing(name)):
            found[name] = packing
    formats = {packing.format for packing in found.values()}
    if "int8" in formats and len(formats) > 1:
        raise CheckpointError(f"{file.path}: mixes {' and '.join(sorted(formats))}; the file is of an unknown kind")
    return found


class _Reader:
    """Reads the packing of each weight of one part."""

    def __init__(self, file: TensorFile, own: Mapping[str, TensorInfo], prefix: str) -> None:
        self.file, self.own, self.prefix = file, own, prefix
        self.marks = _marks(file, own, prefix)
        scales = [name for name in own if name.rpartition(".")[2] in _SCALES and _weight_of(name) in own]
        narrow = [name for name in scales if own[_weight_of(name)].dtype in (*_FP8, "I8", "U8")]
        marked = [layer for layer in self.marks if f"{layer}.weight" in own]
        self.has_scales = bool(narrow or marked or "scaled_fp8" in own)

    def packing(self, name: str) -> Packing | None:
        """Return how a weight is stored, None if it is stored wide."""
        stem, info = name.rpartition(".")[0], self.own[name]
        mark = self.marks.get(stem) if name.endswith(".weight") else None
        scale = next((f"{stem}.{last}" for last in _SCALES if f"{stem}.{last}" in self.own), None)
        scale = scale if name.endswith(".weight") else None
        if info.dtype not in (*_FP8, "I8", "U8"):
            if scale is not None:
                self._refuse(name, f"is {info.dtype} and has a scale, {scale}; the file is of an unknown kind")
            if mark is not None and mark.rotation:
                self._refuse(name, f"is {info.dtype}, and {mark.where} says that it is rotated; take another file")
            return None
        form = self._format(name, info, mark, scale)
        if form == "fp8_raw":
            return Packing(format=form, shape=info.shape, dtype=DTYPES[info.dtype])
        if scale is None:
            self._refuse(name, f"is {info.dtype} ({form}) and has no {stem}.weight_scale; the file is incomplete")
        if form in ("mxfp8", "nvfp4"):
            return self._in_tiles(name, form, scale)
        return self._in_rows(name, form, mark, scale)

    def _format(self, name: str, info: TensorInfo, mark: _Mark | None, scale: str | None) -> str:
        """Return the format by the marker, else by dtypes and shapes."""
        if mark is not None:
            form = "int8_convrot" if mark.rotation else mark.format
            if info.dtype not in (*_DTYPES[form], "U8"):
                self._refuse(name, f"is {info.dtype}, and {mark.where} says {form}; the file is damaged")
            return form
        self._check_unmarked(name)
        if info.dtype == "U8":
            self._refuse(
                name,
                "is U8 without a marker (comfy_quant) that says which format that is, which order its halves and scales "
                "have; allowed: F32, F16, BF16, F8 and I8 with scales, marked NVFP4 and MXFP8, GGUF: take one of them",
            )
        if scale is None:
            if info.dtype == "I8":
                self._refuse(name, f"is I8 without a scale ({_stem(name)}.weight_scale); take a file of another format")
            if self.has_scales:
                self._refuse(
                    name,
                    f"is {info.dtype} without a scale ({_stem(name)}.weight_scale), and the file has scales of others; its "
                    "values would be off by that factor; take a file with all scales, or the bfloat16 weights",
                )
            return "fp8_raw"
        shape, rows = self.own[scale].shape, info.shape[0] if info.shape else 1
        if self.own[scale].dtype not in _WIDE_SCALES:
            self._refuse(
                scale,
                f"is {self.own[scale].dtype}; allowed without a marker (comfy_quant): {', '.join(_WIDE_SCALES)}; MXFP8 and "
                "NVFP4 need the marker, which says how scales are ordered",
            )
        if math.prod(shape) not in (1, rows):
            return "int8_blocks" if info.dtype == "I8" else "fp8_blocks"
        if info.dtype == "I8":
            return "int8" if shape == (rows,) else "int8_tensorwise"
        return "fp8"

    def _check_unmarked(self, name: str) -> None:
        """Refuse a weight without marker in a file that marks others, or whose header speaks, as rotated."""
        rotated = [mark for mark in self.marks.values() if mark.rotation]
        if rotated and self.own[name].dtype == "I8":
            self._refuse(
                name,
                f"has no marker (comfy_quant), and {rotated[0].where} says that weights are rotated; take a file in which "
                "all are marked, or the bfloat16 weights",
            )
        for header in self.file.headers:
            for key, text in header.items():
                said = _ROTATED.search(key) or (len(text) < 200 and _ROTATED.search(text))
                if said and text.strip().lower() not in ("", "0", "false", "none", "no"):
                    self._refuse(
                        name,
                        f"has no marker (comfy_quant), and the header says {key}={text[:80]!r}; weights that are rotated "
                        "cannot be told from others: take a file with markers, or the bfloat16 weights",
                    )

    def _in_rows(self, name: str, form: str, mark: _Mark | None, scale: str) -> Packing:
        """Return the packing of values with one scale, one a row, or one a square."""
        info, by = self.own[name], self.own[scale]
        rows, columns = (*info.shape, 1)[:2] if info.shape else (1, 1)
        if by.dtype not in _WIDE_SCALES:
            self._refuse(scale, f"is {by.dtype}; allowed: {', '.join(_WIDE_SCALES)}")
        side = 0
        if by.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or form in ("fp8_blocks", "int8_blocks"):
            side = self._side(name, scale, mark.side if mark else 0)
            form = f"{form.partition('_')[0]}_blocks"
        rotation = mark.rotation if mark else 0
        if rotation and (side or len(info.shape) != 2 or columns % rotation):
            self._refuse(
                name, f"is {list(info.shape)}; {mark and mark.where} says groups of {rotation} columns are rotated"
            )
        return Packing(
            format=form,
            shape=info.shape,
            dtype=self._dtype(form, info),
            scale=scale,
            group=side,
            side=side,
            rotation=rotation,
        )

    def _side(self, name: str, scale: str, said: int) -> int:
        """Return the side of the squares with one scale: what the marker says, else the power of two that fits."""
        shape, of = self.own[name].shape, self.own[scale].shape
        sides = (said,) if said else _SIDES
        fits = [n for n in sides if len(shape) == 2 and of == (-(-shape[0] // n), -(-shape[1] // n))]
        rows = shape[0] if shape else 1
        if fits:
            return fits[0]
        raise self._error(
            scale,
            f"is {list(of)}; allowed: one number, one for each of the {rows} rows, or one for each square of "
            f"{said or '128'} x {said or '128'}",
        )

    def _in_tiles(self, name: str, form: str, scale: str) -> Packing:
        """Return the packing of values with a scale for some columns, whose scales are in tiles of 128 x 4."""
        info, by, group = self.own[name], self.own[scale], 32 if form == "mxfp8" else 16
        if len(info.shape) != 2:
            self._refuse(name, f"is {list(info.shape)}; {form} needs 2 axes")
        rows, columns = info.shape[0], info.shape[1] * (2 if form == "nvfp4" else 1)
        tiles = (-(-rows // _TILE[0]) * _TILE[0], -(-columns // (group * _TILE[1])) * _TILE[1])
        kinds = ("U8", "F8_E8M0") if form == "mxfp8" else ("U8", "F8_E4M3")
        if columns % group or math.prod(by.shape) != math.prod(tiles) or by.dtype not in kinds:
            self._refuse(
                scale,
                f"is {by.dtype} {list(by.shape)}; {form} of {[rows, columns]} needs {kinds[1]} {list(tiles)}, in tiles of "
                f"{_TILE[0]} x {_TILE[1]}",
            )
        second = None
        if form == "nvfp4":
            second = f"{_stem(name)}.{_SECOND}"
            if second not in self.own:
                self._refuse(name, f"is nvfp4 and has no {second}; the file is incomplete")
            if self.own[second].dtype not in _WIDE_SCALES or math.prod(self.own[second].shape) != 1:
                self._refuse(second, f"is {self.own[second].dtype} {list(self.own[second].shape)}; allowed: one F32")
        shape = (rows, columns)
        mark = self.marks[_stem(name)]
        if mark.shape is not None and mark.shape != shape:
            if len(mark.shape) != 2 or any(
                want > have or have - want >= group for want, have in zip(mark.shape, shape, strict=True)
            ):
                self._refuse(name, f"is {list(shape)}, and {mark.where} says orig_shape={list(mark.shape)}")
            shape = (mark.shape[0], mark.shape[1])  # rows and columns were filled up
        return Packing(format=form, shape=shape, dtype=self._dtype(form, info), scale=scale, second=second, group=group)

    def _dtype(self, form: str, info: TensorInfo) -> torch.dtype:
        """Return the dtype of stored values; a file may keep F8 and I8 as bytes."""
        return DTYPES[_DTYPES[form][0] if info.dtype == "U8" else info.dtype]

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise self._error(name, why)

    def _error(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {self.prefix}{name} {why}")


def _marks(file: TensorFile, own: Mapping[str, TensorInfo], prefix: str) -> dict[str, _Mark]:
    """Return what markers say of each layer of a part, by its name without prefix. Raises `CheckpointError`."""
    found: dict[str, _Mark] = {}
    for header in file.headers:
        for layer, about in _layers(file, header).items():
            if isinstance(about, dict) and about.get("format") is not None:
                own_layer = _layer_of(layer, own)
                if f"{own_layer}.weight" in own or f"{layer}.weight" not in file.infos:  # else it is of another part
                    found[own_layer] = _mark(file, about, where=f"{_HEADER} of {layer} in the header")
    for name in own:
        stem, _, last = name.rpartition(".")
        if last == _MARKER:
            full = prefix + name if prefix + name in file.infos else name
            mark, layer = _mark(file, _json(file, full), where=full), _layer_of(stem, own)
            if f"{layer}.weight" not in own:
                raise CheckpointError(
                    f"{file.path}: {full} is the marker of a weight that is not there; the file is damaged"
                )
            other = found.get(layer)
            if other is not None and (other.format, other.rotation) != (mark.format, mark.rotation):
                raise CheckpointError(f"{file.path}: {mark.where} and {other.where} differ; the file is damaged")
            found[layer] = mark
    return found


def _layer_of(said: str, own: Mapping[str, TensorInfo]) -> str:
    """Return the layer that a marker means: headers name it with another prefix than tensors, some with its weight."""
    parts = said.removesuffix(".weight").split(".")
    names = (".".join(parts[start:]) for start in range(len(parts)))
    return next((name for name in names if f"{name}.weight" in own), said)


def _layers(file: TensorFile, header: Mapping[str, str]) -> dict[str, Any]:
    """Return the layers that a header describes."""
    if _HEADER not in header:
        return {}
    value = _parse(file, header[_HEADER], where=f"{_HEADER} in the header")
    layers = value.get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError(f"{file.path}: {_HEADER} in the header has no layers; the file is damaged")
    return layers


def _json(file: TensorFile, name: str) -> dict[str, Any]:
    info = file.infos[name]
    if info.dtype not in ("U8", "I8") or info.nbytes > _MAX_MARKER:
        raise CheckpointError(f"{file.path}: {name} is {info.dtype} of {info.nbytes} bytes; a marker is U8 with JSON")
    data = file.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
    return _parse(file, data.rstrip(b"\0").decode("utf-8", "replace"), where=name)


def _parse(file: TensorFile, text: str, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: {where} is not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.path}: {where} has to hold a JSON object; the file is damaged")
    check_json(value, where=file.path)
    return value


def _mark(file: TensorFile, about: Mapping[str, Any], *, where: str) -> _Mark:
    """Return what a marker says. Raises `CheckpointError` for formats and changes of weights that are not known."""

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"{file.path}: {where} {why}; take a file of another format, or the bfloat16 weights")

    form = about.get("format")
    if form not in _BY_MARK:
        refuse(f"says format={form!r}, which is not read; allowed: {', '.join(_BY_MARK)}")
    for key, value in about.items():
        if key not in _ABOUT and value not in (None, False, 0, "", [], {}):
            refuse(f"says {key}={value!r}, of which it is not known how it changes the weights")
    rotation = 0
    if about.get("convrot") not in (None, True, False):
        refuse(f"says convrot={about['convrot']!r}, which has to be true or false")
    if about.get("convrot"):
        rotation = about.get("convrot_groupsize", 256)
        if form != "int8_tensorwise" or type(rotation) is not int or rotation not in _GROUPS:
            refuse(
                f"says format={form!r}, convrot_groupsize={rotation!r}; a rotation is undone for int8_tensorwise and "
                f"groups of {', '.join(map(str, _GROUPS))}"
            )
    side = about.get("group_size") or about.get("block_size") or 0
    if type(side) is not int or side < 0:
        refuse(f"says group_size={side!r}, which has to be a whole number")
    shape = about.get("orig_shape")
    if shape is not None and not (isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)):
        refuse(f"says orig_shape={shape!r}, which has to be a list of sizes")
    return _Mark(
        format=_BY_MARK[form], rotation=rotation, side=side, shape=None if shape is None else tuple(shape), where=where
    )


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _weight_of(scale: str) -> str:
    return f"{_stem(scale)}.weight"
