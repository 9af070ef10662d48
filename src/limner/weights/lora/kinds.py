"""The kinds of updates in LoRA files: which tensors make one, and what is refused, with the reason.

A key is the name of a matrix and a part of its update, such as `lora_A.weight`. PEFT's own names have the adapter's in them
(`lora_A.default.weight`). Knows no names of matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from limner.errors import CheckpointError

__all__ = ["KINDS", "REFUSED", "Group", "Tensors", "group_keys", "is_part", "kind_of", "refusal"]

Tensors = Mapping[str, Tensor]

KINDS = {
    "LoRA": ("up @ down", "down", "up"),
    "LoKr": (
        "kron(w1, w2), each whole or a product",
        *(f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")),
    ),
    "LoHa": ("(w1_a @ w1_b) * (w2_a @ w2_b)", *(f"hada_w{i}_{side}" for i in (1, 2) for side in "ab")),
    "difference": ("the difference of the weights itself", "diff"),
    "OFT": ("a rotation R of the rows of the weights W, (R - 1) W", "oft_blocks"),
}
"""Kinds that are read: their formula and their parts, beside `alpha`."""

_BAKE = "merge it into its model with its trainer, and give the merged model or the difference of weights (.diff)"
REFUSED = {
    "DoRA": (
        ("dora_scale", "lora_magnitude_vector"),
        "which rescales the weights too; that is not supported, and the rest alone would be wrong",
    ),
    "PEFT's OFT": (
        ("oft_R",),
        f"whose rotation depends on settings that are not in the tensors (block size, Cayley-Neumann); {_BAKE}",
    ),
    "BOFT": (("boft_R", "boft_s"), f"a chain of rotations of the weights, which is not supported; {_BAKE}"),
    "rescaled OFT": (("rescale", "oft_diag"), f"which rescales the weights too; that is not supported; {_BAKE}"),
    "GLoRA": (
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
        f"whose product depends on the weights; that is not supported; {_BAKE}",
    ),
    "(IA)^3": (("ia3_l", "on_input"), f"which rescales the weights; that is not supported; {_BAKE}"),
    "T-LoRA": (
        ("q_layer.weight", "p_layer.weight", "lambda_layer"),
        "whose rank depends on the noise level; that is not supported; use a plain LoRA",
    ),
    "AdaLoRA": (("lora_E", "ranknum"), f"which scales each rank; that is not supported; {_BAKE}"),
    "VeRA": (("vera_lambda_b", "vera_lambda_d"), f"whose matrices are not in the file; {_BAKE}"),
    "a convolution's update": (
        ("lora_mid.weight", "lokr_t1", "lokr_t2", "hada_t1", "hada_t2"),
        "and this transformer has no convolutions: it is of another model",
    ),
    "a bias": (("bias", "diff_b", "b_norm"), "and no matrix of this transformer has one; train without biases"),
    "a replaced weight": (("set_weight", "reshape_weight"), "and only differences are added; give a .diff"),
}
"""What is known and refused: its parts, and the reason with the remedy."""

_PLAIN = {part for _, *parts in KINDS.values() for part in parts} | {"alpha"}
_WITH_ADAPTER = ("lora_magnitude_vector", "oft_R", "boft_R", "boft_s", "ia3_l", "lora_E", "ranknum")
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<side>lora_[AB]|lora_(?:down|up)|lora\.(?:down|up))(?:\.(?P<adapter>\w+))?\.(?P<kind>weight|bias)"
    rf"|(?P<plain>{'|'.join(sorted((re.escape(p) for p in _PLAIN - {'down', 'up'}), key=len, reverse=True))})"
    r"(?:\.(?P<adapter2>default\w*))?"
    rf"|(?P<refused>{'|'.join(re.escape(p) for parts, _ in REFUSED.values() for p in parts if p != 'bias')})"
    r"(?:\.\w+)?(?:\.weight)?)"
)
_SIDES = {"lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up"}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Group:
    """The tensors of one matrix in a file, and their names there, by part. `where` names the file in messages."""

    where: str
    module: str
    keys: Mapping[str, str]
    parts: Tensors

    @property
    def key(self) -> str:
        """One of the names, not that of an alpha if there is another."""
        return next((key for part, key in self.keys.items() if part != "alpha"), self.keys.get("alpha", ""))

    def __str__(self) -> str:
        return ", ".join(
            f"{key} is {list(self.parts[part].shape)}" for part, key in self.keys.items() if part != "alpha"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Key:
    module: str
    part: str
    adapter: str


def _read(key: str) -> _Key | None:
    match = _PART.fullmatch(key)
    if match is None:
        return None
    if match["side"]:
        part = "bias" if match["kind"] == "bias" else _SIDES[match["side"]]
        return _Key(module=match["module"], part=part, adapter=match["adapter"] or "")
    return _Key(module=match["module"], part=match["plain"] or match["refused"], adapter=match["adapter2"] or "")


def is_part(key: str) -> bool:
    """Return True for the name of a tensor that is part of an update."""
    return _read(key) is not None


def group_keys(keys: Iterable[str], *, where: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the keys of a file by module and part of its update ("down"), and those of no update.

    Raises `CheckpointError` for two tensors that are the same part, such as those of two adapters.
    """
    groups: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        found = _read(key)
        if found is None:
            others.append(key)
            continue
        own = groups.setdefault(found.module, {})
        if found.part in own:
            raise CheckpointError(
                f"lora: {where}: {own[found.part]} and {key} are the same part of one update; keep one adapter in a file"
            )
        own[found.part] = key
    return groups, others


def refusal(part: str) -> str | None:
    """Return why a part of an update is refused; None if it is used."""
    for kind, (parts, reason) in REFUSED.items():
        if part in parts:
            article = "" if kind.startswith(("a ", "PEFT")) else "of an " if kind.startswith("A") else "of a "
            return f"is {article}{kind}, {reason}"
    return None


def kind_of(parts: Iterable[str]) -> str | None:
    """Return the kind of an update by its parts; None if there is none, or parts of several kinds."""
    own = set(parts) - {"alpha"}
    kinds = [kind for kind, (_, *names) in KINDS.items() if own & set(names)]
    return kinds[0] if len(kinds) == 1 else None
