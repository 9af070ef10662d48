"""One part of a model in whatever layout: its configuration, and its tensors one at a time under our networks' names.

Tensors that are stored wide are memory-mapped and not copied (a third of a fused projection is a view). Others are widened
when they are read (`unpack`, GGUF), rounded once. Scales of activations (input_scale) are not used: products run wide. So
at most one tensor is in memory twice, and staging can read the few that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import CheckpointError
from limner.model.int8 import quantize_weight
from limner.weights.digest import sample
from limner.weights.files import DTYPES, WIDE, TensorFile, TensorInfo, dtype_name, some_names
from limner.weights.gguf import GgufFile
from limner.weights.layouts import Layout
from limner.weights.names import Rule
from limner.weights.networks import text_unread
from limner.weights.packing import Packing
from limner.weights.unpack import row_scales, unpack

__all__ = ["Checkpoint", "Problems"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problems:
    """How a file differs from what its network reads, by the file's names; `shapes` are sentences."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def __str__(self) -> str:
        text = some_names("missing", self.missing) + some_names("unexpected", self.unexpected)
        more = [f"and {len(self.shapes) - 4} more shapes"] if len(self.shapes) > 4 else []
        return (text + "; ".join([*self.shapes[:4], *more])).rstrip("; ")


class Checkpoint:
    """A part of a model. `config` is its config.json, `where` the path for messages."""

    def __init__(self, file: TensorFile, layout: Layout, config: Mapping[str, Any], *, where: Path) -> None:
        self.file, self.layout, self.config, self.where = file, layout, config, where

    @property
    def natural_dtype(self) -> torch.dtype | None:
        """The dtype that tensors get if none is given; None: each keeps its own.

        bfloat16 for what is quantized. A network has one dtype throughout, so a file that mixes them (norms in float32)
        is cast to the dtype of most of its bytes. The statistics of an autoencoder are no part of its arithmetic.
        """
        if self.layout.quantization not in (None, "int8"):
            return torch.bfloat16
        if self.layout.part == "transformer":
            return self._commonest()
        kinds = {
            info.dtype
            for name, info in self.layout.tensors.items()
            if info.dtype in WIDE and not name.startswith(_STATISTICS)
        }
        return self._commonest() if len(kinds) > 1 else None

    def _commonest(self) -> torch.dtype:
        sizes = {kind: sum(info.nbytes for info in self.layout.tensors.values() if info.dtype == kind) for kind in WIDE}
        return DTYPES[max(sizes, key=lambda kind: sizes[kind])] if any(sizes.values()) else torch.bfloat16

    def _wide(self, source: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype that a tensor gets; None: its own."""
        keeps = dtype is None and self.layout.part == "vae" and source.startswith(_STATISTICS)
        return None if keeps and source not in self.layout.packings else dtype or self.natural_dtype

    def has(self, target: str) -> bool:
        return self._source(self.layout.names.rule(target)) is not None

    def info(self, target: str, dtype: torch.dtype | None = None) -> TensorInfo:
        """Return the dtype, shape and bytes that a tensor has once it is read."""
        rule = self.layout.names.rule(target)
        source = self._source(rule)
        assert source is not None, target
        stored, shape = self.layout.tensors[source], self._shape(rule, source)
        kind = stored.dtype
        if kind != "I64":
            wide = self._wide(source, dtype) or (DTYPES[kind] if kind in WIDE else self._commonest())
            kind = dtype_name(wide)
        count = torch.Size(shape).numel()
        return TensorInfo(dtype=kind, shape=shape, nbytes=count * DTYPES[kind].itemsize)

    def problems(
        self, expected: Mapping[str, Tensor], *, used: int | None = None, depth: int | None = None
    ) -> Problems:
        """Compare the file with a network's tensors. Of a text encoder, layers from `used` of `depth` are not read."""
        missing, shapes, known = [], [], set()
        for target, want in expected.items():
            if _is_scale(target, expected):
                continue
            rule = self.layout.names.rule(target)
            source = self._source(rule)
            if source is None:
                if not target.endswith("num_batches_tracked"):
                    missing.append(self._shown(rule.source))
                continue
            known.add(source)
            if self._shape(rule, source) != tuple(want.shape):
                stored = self.layout.tensors[source].shape
                asked = (rule.part[1] * want.shape[0], *want.shape[1:]) if want.dim() else ()
                asked += (1, 1) if rule.pointwise and len(stored) == 4 else ()
                shapes.append(f"{self._shown(source)} is {list(stored)}, the configuration asks for {list(asked)}")
        unread = self._unread(used, depth)
        extra = [self._shown(name) for name in self.layout.tensors if name not in known and name not in unread]
        unique = dict.fromkeys
        return Problems(missing=tuple(unique(missing)), unexpected=tuple(unique(extra)), shapes=tuple(unique(shapes)))

    def check(self, expected: Mapping[str, Tensor], *, used: int | None = None, depth: int | None = None) -> None:
        """Raise `CheckpointError` unless the tensors are exactly those of the network."""
        if found := str(self.problems(expected, used=used, depth=depth)):
            raise CheckpointError(f"{self.where}: {found}; these weights are of another model, or incomplete")

    def read(self, target: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return one tensor, widened and cast to `dtype` (None: the natural one)."""
        rule = self.layout.names.rule(target)
        source = self._source(rule)
        if source is None:
            raise CheckpointError(f"{self.where}: missing {self._shown(rule.source)}; the file is incomplete")
        wide, whole = self._wide(source, dtype), rule.part[1] == 1
        rows, packing = None if whole else self._rows(rule, source), self.layout.packings.get(source)
        if isinstance(self.file, GgufFile):
            value = self.file.read_as(self._full(source), wide, rows)
        elif packing is not None:
            value = self._unpack(source, packing, rows, wide or self._commonest())
        else:
            value = self.file.read(self._full(source))
            value = value if rows is None else value[rows]
            value = value.to(wide) if wide is not None and value.is_floating_point() else value
        if rule.swap:
            first, second = value.chunk(2)
            value = torch.cat([second, first])
        return value.flatten(1) if rule.pointwise else value

    def read_int8(self, target: str, dtype: torch.dtype | None = None, *, check: bool = True) -> tuple[Tensor, Tensor]:
        """Return a matrix as Limner's int8, (weight, weight_scale): as it is stored, or quantized now.

        What stands for values times one scale a row is as it is stored, in files of other tools too.
        """
        rule = self.layout.names.rule(target)
        source = self._source(rule) or rule.source
        packing = self.layout.packings.get(source)
        if self.layout.quantization == "int8" and packing is None:
            raise CheckpointError(
                f"{self.where}: {self._shown(source)} is not int8, others are; quantize the model again"
            )
        if packing is None or not packing.is_int8 or packing.scale is None:
            return quantize_weight(self._finite(target, dtype) if check else self.read(target, dtype))
        scale, rows = row_scales(packing, self.file.read(self._full(packing.scale))), self._rows(rule, source)
        if check:
            _check_finite(scale, name=self._shown(packing.scale), where=self.where)
        return self.file.read(self._full(source)).view(torch.int8)[rows], scale[rows]

    def stream(
        self, expected: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, check: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a network one at a time; int8 ones are quantized unless they are stored so.

        `check` refuses NaN and infinity in norms, scales and other short tensors, and in one value of each row of others.
        """
        for target, want in expected.items():
            if want.dtype == torch.int8:
                weight, scale = self.read_int8(target, dtype, check=check)
                yield target, weight
                yield f"{target}_scale", scale
            elif target.endswith("num_batches_tracked") and not self.has(target):
                yield target, torch.zeros((), dtype=torch.int64)  # counts training; some files leave it out
            elif not _is_scale(target, expected):
                yield target, self._finite(target, dtype) if check else self.read(target, dtype)

    def _finite(self, target: str, dtype: torch.dtype | None) -> Tensor:
        value = self.read(target, dtype)
        _check_finite(value, name=self._shown(self.layout.names.rule(target).source), where=self.where)
        return value

    def _unpack(self, source: str, packing: Packing, rows: slice | None, dtype: torch.dtype) -> Tensor:
        scale, second = (
            None if name is None else self.file.read(self._full(name)) for name in (packing.scale, packing.second)
        )
        value = unpack(packing, self.file.read(self._full(source)), scale, second, rows=rows, dtype=dtype)
        top = torch.finfo(packing.dtype).max / 2 if packing.format == "fp8_raw" else None
        if top is not None and value.dim() > 1 and value.numel() and max(map(abs, map(float, value.aminmax()))) >= top:
            raise CheckpointError(
                f"{self.where}: {self._shown(source)} is F8 without a scale and has values over {top:g}, which no weights "
                "have: the file has lost its scales (weight_scale); take a file with scales, or the bfloat16 weights"
            )
        return value

    def _source(self, rule: Rule) -> str | None:
        return self.layout.source(rule)

    def _shape(self, rule: Rule, source: str) -> tuple[int, ...]:
        shape, of = self.layout.tensors[source].shape, rule.part[1]
        if rule.pointwise and shape[2:] == (1, 1):
            shape = shape[:2]
        if of > 1:
            shape = (shape[0] // of if shape and shape[0] % of == 0 else -1, *shape[1:])
        return shape

    def _rows(self, rule: Rule, source: str) -> slice:
        index, of = rule.part
        height = self.layout.tensors[source].shape[0] // of
        return slice(index * height, (index + 1) * height)

    def _full(self, source: str) -> str:
        """Return the name in the file; a language model's head has no prefix."""
        full = self.layout.prefix + source
        return full if full in self.file.infos else source

    def _shown(self, source: str) -> str:
        return source if source in self.file.infos else self.layout.prefix + source

    def _unread(self, used: int | None, depth: int | None) -> set[str]:
        if self.layout.part != "text_encoder" or used is None or depth is None:
            return set()
        names = {
            self.layout.names.rule(f"layers.{n}.{name}").source for n in range(used, depth) for name in _TEXT_NAMES
        }
        names |= {
            self.layout.names.rule(name).source
            for name in ("norm.weight", "lm_head.weight")
            if text_unread(name, used=used, depth=depth)
        }
        return names | {name for name in self.layout.tensors if text_unread(name, used=used, depth=depth)}


_STATISTICS = "bn."
"""Names of the running statistics by which an autoencoder's latents are normalised."""
_TEXT_NAMES = tuple(
    f"{name}.weight"
    for name in (
        *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        *("input_layernorm", "post_attention_layernorm"),
    )
)


def _is_scale(target: str, expected: Mapping[str, Tensor]) -> bool:
    """Return True for the scale of an int8 matrix of the network, which is read together with the matrix."""
    matrix = expected.get(target.removesuffix("_scale")) if target.endswith(".weight_scale") else None
    return matrix is not None and matrix.dtype == torch.int8


def _check_finite(value: Tensor, *, name: str, where: str | os.PathLike[str]) -> None:
    """Refuse NaN and infinity in vectors, and in one value of each row of a matrix, whose pages are read anyway."""
    if value.is_floating_point() and not torch.isfinite(value if value.dim() < 2 else sample(value)).all():
        raise CheckpointError(
            f"{where}: {name} holds values that are not finite in {str(value.dtype).removeprefix('torch.')} (NaN or "
            "infinite); the file is damaged, or the dtype too narrow: download it again, or use bfloat16"
        )
