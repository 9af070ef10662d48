"""Build the update of each matrix from the tensors of a LoRA file, and check their shapes and values.

Scales stay apart from the tensors instead of being multiplied into them, so nothing is rounded on the way. Only the alpha
of a LoKr is multiplied into its first factor, in float32, as diffusers does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limner.errors import CheckpointError
from limner.model.lora import Dense, Hadamard, Kronecker, LowRank, Update
from limner.weights.lora.dialects import Matrix
from limner.weights.lora.kinds import KINDS, Group, Tensors, kind_of, refusal
from limner.weights.lora.scales import Scales

__all__ = ["Base", "check_values", "updates_of"]

Base = Callable[[str], Tensor]
"""Returns the weights (N, K) of one of the transformer's matrices, without any update."""


def updates_of(group: Group, matrix: Matrix, scales: Scales, *, base: Base | None = None) -> dict[str, Update]:
    """Return the updates of one matrix of the file, by the names of the transformer's matrices.

    `base` is needed for rotations alone, whose product depends on the weights. Raises `CheckpointError`.
    """
    parts, kind = group.parts, kind_of(group.parts)
    assert kind is not None
    whole: Update
    if kind == "LoRA":
        down, up = _wide(parts["down"]), _wide(parts["up"])
        scale = _scale(group, matrix, scales, down.shape[0])
        if matrix.dialect.prefix == "lora_unet_" and (apart := _joined_apart(down, up, len(matrix.targets))):
            return {
                target: LowRank(down=one, up=two, scale=scale(target))
                for target, (one, two) in zip(matrix.targets, apart, strict=True)
            }
        whole = LowRank(down=down, up=up)
    elif kind == "LoHa":
        w1, w2 = ((_wide(parts[f"hada_w{i}_b"]), _wide(parts[f"hada_w{i}_a"])) for i in (1, 2))
        whole = Hadamard(down_1=w1[0], up_1=w1[1], down_2=w2[0], up_2=w2[1])
        scale = _scale(group, matrix, scales, w1[0].shape[0])
    elif kind == "LoKr":
        whole, scale = _kronecker(group, matrix, scales)
    else:
        delta = _rotated(group, matrix, base) if kind == "OFT" else _wide(parts["diff"])
        whole, scale = Dense(weight=delta), _one
    return _by_target(whole, matrix, scale, group)


def _by_target(whole: Update, matrix: Matrix, scale: Callable[[str], float], group: Group) -> dict[str, Update]:
    """Divide the rows of a matrix of the file among the transformer's."""
    num_rows = whole.shape[0]
    num = num_rows // len(matrix.targets)
    if num * len(matrix.targets) != num_rows:
        raise CheckpointError(
            f"lora: {group.where}: {group}: {num_rows} rows are not those of {len(matrix.targets)} matrices "
            f"({', '.join(matrix.targets)}); it is of another model"
        )
    first = num_rows // 2 if matrix.swapped else 0
    found: dict[str, Update] = {}
    for number, target in enumerate(matrix.targets):
        found[target] = replace(whole.rows(first + number * num, num), scale=scale(target))
    return found


def _scale(group: Group, matrix: Matrix, scales: Scales, rank: int | None) -> Callable[[str], float]:
    """Return the scale of each target: from the alpha in the file, else the configuration, else 1."""
    alpha = group.parts.get("alpha")

    def scale(target: str) -> float:
        known = scales.of((matrix.name, target), rank)
        if alpha is None or rank is None:
            return 1.0 if known is None else known
        own = alpha.item() / rank
        if known is not None and not math.isclose(known, own, rel_tol=1e-3):
            raise CheckpointError(
                f"lora: {group.where}: {group.keys['alpha']} makes the scale {own:.4g}, and the configuration of the "
                f"adapter {known:.4g}; remove the wrong one"
            )
        return own

    return scale


def _joined_apart(down: Tensor, up: Tensor, num: int) -> list[tuple[Tensor, Tensor]] | None:
    """Return the LoRAs of q, k and v that were trained apart and joined: `up` has a block for each, and zeros elsewhere.

    kohya's scripts join them for the original names; diffusers takes the zeros out too.
    """
    if num == 1 or up.shape[0] % num or down.shape[0] % num:
        return None
    downs, blocks = down.chunk(num), [rows.chunk(num, dim=1) for rows in up.chunk(num)]
    if any(blocks[i][j].count_nonzero() for i in range(num) for j in range(num) if i != j):
        return None
    return [(downs[i], blocks[i][i]) for i in range(num)]


def _kronecker(group: Group, matrix: Matrix, scales: Scales) -> tuple[Kronecker, Callable[[str], float]]:
    """Return the update of a LoKr, with the alpha of the file in its first factor; for two whole ones it has no meaning."""
    parts = {part: value.float() for part, value in group.parts.items()}
    rank = next((parts[part].shape[0] for part in ("lokr_w2_b", "lokr_w1_b") if part in parts), None)
    alpha = parts.pop("alpha", None)
    known = _scale(group, matrix, scales, rank)
    if alpha is not None and rank is not None:
        first = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
        if first in parts:
            known(matrix.targets[0])  # refuses a configuration that says otherwise
            parts[first] = parts[first] * (alpha.item() / rank)
        known = _one
    left, right = (_factor(parts, f"lokr_w{i}", group) for i in (1, 2))
    return Kronecker(left=left, right=right, num_rows=left.shape[0] * right.shape[0]), known


def _one(target: str) -> float:
    return 1.0


def _factor(parts: Tensors, name: str, group: Group) -> Tensor:
    """Return one side of a Kronecker product: a matrix, or a product of two."""
    if name in parts:
        return parts[name]
    try:
        return parts[f"{name}_a"] @ parts[f"{name}_b"]
    except (KeyError, RuntimeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"lora: {group.where}: {group.module}.{name}: {reason}; the file is damaged") from error


@torch.no_grad()
def _rotated(group: Group, matrix: Matrix, base: Base | None) -> Tensor:
    """Return what an OFT adds to its matrix: (R - 1) W, of blocks of rows (LyCORIS, functional/diag_oft.py).

    R = (1 + Q) / (1 - Q) with Q = B - B^T. An alpha above 0 bounds the norm of Q to itself times the number of rows. Row m
    of a block gets the rows n times R[n, m].
    """
    if base is None:
        raise CheckpointError(
            f"lora: {group.where}: {group.key}: is an OFT, a rotation of the weights, which needs whole weights "
            "that are not quantized; load the model without quantize and not divided, or use a LoRA"
        )
    weight = torch.cat([base(target) for target in matrix.targets])
    if matrix.swapped:
        weight = weight.roll(weight.shape[0] // 2, 0)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    blocks = group.parts["oft_blocks"].to(weight)
    num, size, _ = blocks.shape
    if num * size != weight.shape[0]:
        raise CheckpointError(
            f"lora: {group.where}: {group.key}: {num} blocks of {size} rows are not the {weight.shape[0]} rows of "
            f"{', '.join(matrix.targets)}; it is of another model"
        )
    skew = blocks - blocks.transpose(1, 2)
    bound = group.parts["alpha"].item() * weight.shape[0] if "alpha" in group.parts else 0.0
    if bound > 0 and (norm := skew.norm() + 1e-8) > bound:
        skew = skew * (bound / norm)
    one = torch.eye(size).to(weight)
    turn: Tensor = torch.linalg.solve(one - skew, one + skew, left=False) - one
    delta: Tensor = turn.transpose(1, 2) @ weight.view(num, size, -1)
    return delta.flatten(0, 1)


def _wide(value: Tensor) -> Tensor:
    """Return 8 bit formats in float32, since few operations take them."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value


def check_values(group: Group) -> None:
    """Check that an update is whole, and shapes, dtypes and values of its tensors. Raises `CheckpointError`."""
    parts, keys, where = group.parts, group.keys, group.where
    kind = kind_of(parts)
    if kind is None:
        raise CheckpointError(
            f"lora: {where}: {', '.join(keys.values())}: these make no update of one kind ({', '.join(KINDS)}); the "
            "file is incomplete, or of several"
        )
    if kind == "OFT" and parts["oft_blocks"].dim() == 4:
        raise CheckpointError(f"lora: {where}: {keys['oft_blocks']}: {refusal('boft_R')}")
    for part, value in parts.items():
        dims = 3 if part == "oft_blocks" else 2
        if part == "alpha":
            right, wanted = value.numel() == 1, "one number"
        else:
            right = value.dim() == dims and value.is_floating_point() and 0 not in value.shape
            wanted = "a matrix of floating point numbers" if dims == 2 else "blocks of a rotation, of 3 dimensions"
        if not right:
            raise CheckpointError(
                f"lora: {where}: {keys[part]} is {value.dtype} {list(value.shape)}; it has to be {wanted}"
            )
        if not torch.isfinite(_wide(value)).all() and not (part == "alpha" and _without_alpha(parts)):
            why = (
                "a half precision is too narrow for it: save it in float32"
                if part == "alpha"
                else "the file is damaged"
            )
            raise CheckpointError(f"lora: {where}: {keys[part]} holds values that are not finite; {why}")
    if kind == "difference" and "alpha" in parts:
        raise CheckpointError(
            f"lora: {where}: {keys['alpha']}: a difference of weights has no alpha; remove it, or scale the difference"
        )
    if kind == "LoRA":
        _check_pair(group, "down", "up", names=("down (lora_A)", "up (lora_B)"))
    if kind == "LoHa":
        for i in (1, 2):
            _check_pair(group, f"hada_w{i}_b", f"hada_w{i}_a", names=(f"hada_w{i}_b", f"hada_w{i}_a"))
        one, two = (_product_shape(parts, f"hada_w{i}_b", f"hada_w{i}_a") for i in (1, 2))
        if one != two:
            raise CheckpointError(
                f"lora: {where}: {group}: these are products of different shapes; the file is damaged"
            )


def _without_alpha(parts: Tensors) -> bool:
    """True for a LoKr of two whole factors, which has no rank: ai-toolkit writes 9999999999 there, infinite in float16."""
    return "lokr_w1" in parts and "lokr_w2" in parts


def _product_shape(parts: Tensors, down: str, up: str) -> tuple[int, int]:
    return parts[up].shape[0], parts[down].shape[1]


def _check_pair(group: Group, down: str, up: str, *, names: Sequence[str]) -> None:
    for part, name in zip((down, up), names, strict=True):
        if part not in group.parts:
            raise CheckpointError(f"lora: {group.where}: {group.key} has no {name} beside it; the file is incomplete")
    if group.parts[down].shape[0] != group.parts[up].shape[1]:
        raise CheckpointError(f"lora: {group.where}: {group}: these are of different ranks; the file is damaged")
