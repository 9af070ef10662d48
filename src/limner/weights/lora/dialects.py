"""The dialects of LoRA files: how the matrices of the transformer are called in each of them.

A name is a prefix and a layout's name of the matrix, in some dialects with `_` for `.`. The names of the original layout
come from the table that whole checkpoints are read with. Knows matrices by name, and no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from limner.weights.names import transformer_names

__all__ = ["DIALECTS", "Dialect", "Matrix", "NamedMatrices", "all_blocks_as_one", "matrices_of_one_block"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """Names that begin with `prefix`, followed by those of `layout`; with `flat`, each `.` in these is a `_`.

    `writers` are programs whose files are in this dialect.
    """

    prefix: str
    layout: Literal["diffusers", "original"]
    flat: bool = False
    writers: str = ""

    @property
    def title(self) -> str:
        start = f"{self.prefix!r} before " if self.prefix else ""
        return f"{start}{self.layout} names{' with _ for .' if self.flat else ''}"


DIALECTS = (
    Dialect(prefix="transformer.", layout="diffusers", writers="diffusers, SimpleTuner, OneTrainer"),
    Dialect(prefix="", layout="diffusers", writers="DiffSynth-Studio, SimpleTuner (LoKr)"),
    Dialect(prefix="diffusion_model.", layout="diffusers", writers="exports for ComfyUI"),
    Dialect(prefix="base_model.model.", layout="diffusers", writers="PEFT around diffusers' network"),
    Dialect(prefix="diffusion_model.", layout="original", writers="ai-toolkit, SimpleTuner for ComfyUI"),
    Dialect(prefix="model.diffusion_model.", layout="original", writers="extracted from ComfyUI's checkpoints"),
    Dialect(prefix="base_model.model.", layout="original", writers="PEFT around the original network, fal"),
    Dialect(prefix="", layout="original", writers="OneTrainer, SD.Next"),
    Dialect(prefix="transformer.", layout="original", writers="OneTrainer"),
    Dialect(prefix="lora_unet_", layout="original", flat=True, writers="musubi-tuner and other scripts of kohya"),
    Dialect(prefix="lora_unet_", layout="diffusers", flat=True, writers="kohya's names of diffusers' network"),
    Dialect(prefix="lora_transformer_", layout="diffusers", flat=True, writers="OneTrainer (legacy)"),
    Dialect(prefix="lora_transformer_", layout="original", flat=True, writers="OneTrainer (legacy)"),
    Dialect(prefix="lycoris_", layout="diffusers", flat=True, writers="LyCORIS, SimpleTuner"),
    Dialect(prefix="lycoris_", layout="original", flat=True, writers="LyCORIS around the original network"),
)
"""All dialects that are read, each with every kind of update; the first that has a name has it."""

_CUT = "diffusion_model.sformer_blocks."
"""How some exports begin `diffusion_model.transformer_blocks.`; diffusers reads it too."""
_FUSED = {"to_q": "to_qkv", "add_q_proj": "to_added_qkv"}
"""Names that diffusers gives to q, k and v in one matrix, by that of q."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A matrix of a file: the matrices of the transformer that its rows are for, in order, in equal parts.

    `swapped`: the file has the halves of its rows in the other order. `dialect` is how it is named, `name` what is left of
    the name without the prefix.
    """

    targets: tuple[str, ...]
    swapped: bool
    dialect: Dialect
    name: str


class NamedMatrices:
    """The names of a transformer's matrices in all dialects."""

    def __init__(self, targets: Iterable[str]) -> None:
        found: dict[tuple[str, bool], dict[str, tuple[tuple[str, ...], bool]]] = {}
        for layout, name, place in _layouts(list(targets)):
            for flat in (False, True):
                found.setdefault((layout, flat), {})[name.replace(".", "_") if flat else name] = place
        self._found = found

    def find(self, module: str) -> Matrix | None:
        """Return the matrix with this name in a file; None if no dialect has it."""
        if module.startswith(_CUT):
            module = f"diffusion_model.transformer_blocks.{module.removeprefix(_CUT)}"
        for dialect in DIALECTS:
            if not module.startswith(dialect.prefix):
                continue
            name = module.removeprefix(dialect.prefix)
            if place := self._found.get((dialect.layout, dialect.flat), {}).get(name):
                return Matrix(targets=place[0], swapped=place[1], dialect=dialect, name=name)
        return None


def _layouts(targets: list[str]) -> Iterator[tuple[str, str, tuple[tuple[str, ...], bool]]]:
    """Yield layout and name of each matrix, with the targets that it stands for, and if its halves are swapped."""
    for target in targets:
        yield "diffusers", target, ((target,), False)
    for source, rules in transformer_names().sources(f"{target}.weight" for target in targets).items():
        names = tuple(rule.target.removesuffix(".weight") for rule in rules)
        yield "original", source.removesuffix(".weight"), (names, rules[0].swap)
        if len(names) > 1:
            block, _, first = names[0].rpartition(".")
            yield "diffusers", f"{block}.{_FUSED[first]}", (names, False)


@cache
def matrices_of_one_block() -> NamedMatrices:
    """Return the matrices of any transformer of the family, as if it had one block of each kind, number 0."""
    names = [rule.with_numbers({"n": "0"}).target for rule in transformer_names().rules]
    return NamedMatrices(name.removesuffix(".weight") for name in names if ".norm_" not in name)


def all_blocks_as_one(module: str) -> str:
    """Return a name with the number of its block replaced by 0."""
    return re.sub(r"(blocks[._])\d{1,6}(?=[._])", r"\g<1>0", module, count=1)
