"""Build the update of each matrix from the tensors of a LoRA file, and check their shapes and values.

Scales stay apart from the tensors instead of being multiplied into them, so nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from limner.errors import CheckpointError
from limner.model.lora import Kronecker, LowRank, Update
from limner.weights.lora.dialects import Tensors, fused_parts, halves_swapped, is_lokr, pair, widened
from limner.weights.lora.scales import Scales

__all__ = ["check_values", "updates_of"]


def updates_of(
    module: str, parts: Tensors, named: Mapping[str, Tensors], scales: Scales, *, where: str
) -> dict[str, Update]:
    """Return the updates of one matrix of the file, by the names of the transformer's matrices.

    `parts` are its tensors as the file has them, `named` as `known_names` translates them. Raises `CheckpointError`.
    """
    made: dict[str, Update] = {}
    for target, own in named.items():
        if is_lokr(own):
            made |= _kronecker(module, target, own, scales, where=where)
        else:
            made[target] = _low_rank(parts, target, own, scales)
    if halves_swapped(module):
        for target, update in made.items():
            half = update.shape[0] // 2
            if isinstance(update, LowRank):
                made[target] = replace(update, up=update.up.roll(-half, 0))
            else:
                made[target] = replace(update, first_row=half)
    return made


def _kronecker(module: str, target: str, own: Tensors, scales: Scales, *, where: str) -> dict[str, Update]:
    """Return the update of a LoKr; over a fused matrix one for each of q, k and v, which are some of its rows."""
    left, right = (_factor(own, f"lokr_w{i}", module=module, where=where) for i in (1, 2))
    known = scales.of(target, None)
    scale = 1.0 if known is None else known
    whole = Kronecker(left=left, right=right, scale=scale, num_rows=left.shape[0] * right.shape[0])
    names = fused_parts(target) or (target,)
    rows = whole.num_rows // len(names)
    if rows * len(names) != whole.num_rows:
        raise CheckpointError(f"lora: {where}: {module}: {whole.num_rows} rows are not those of q, k and v")
    return {name: replace(whole, first_row=i * rows, num_rows=rows) for i, name in enumerate(names)}


def _low_rank(parts: Tensors, target: str, own: Tensors, scales: Scales) -> LowRank:
    down = pair(parts)[0]
    assert down is not None
    rank, alpha = down.shape[0], parts.get("alpha")
    known = scales.of(target, rank) if alpha is None else alpha.item() / rank
    return LowRank(down=own["lora_A.weight"], up=own["lora_B.weight"], scale=1.0 if known is None else known)


def _factor(parts: Tensors, name: str, *, module: str, where: str) -> Tensor:
    """Return one side of a Kronecker product: a matrix, or a product of two."""
    if name in parts:
        return parts[name]
    try:
        return parts[f"{name}_a"] @ parts[f"{name}_b"]
    except (KeyError, RuntimeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"lora: {where}: {module}.{name}: {reason}; the file is damaged") from error


def check_values(parts: Tensors, keys: Mapping[str, str], *, where: str) -> None:
    """Check shapes, dtypes and values of the tensors of one matrix; `keys` are their names. Raises `CheckpointError`."""
    for part, value in parts.items():
        if part == "alpha":
            right = value.numel() == 1
        else:
            right = value.dim() == 2 and value.is_floating_point() and 0 not in value.shape
        if not right:
            wanted = "one number" if part == "alpha" else "a matrix of floating point numbers"
            raise CheckpointError(
                f"lora: {where}: {keys[part]} is {value.dtype} {list(value.shape)}; it has to be {wanted}"
            )
        if not torch.isfinite(widened(value)).all():
            raise CheckpointError(f"lora: {where}: {keys[part]} holds values that are not finite; the file is damaged")
    if is_lokr(parts):
        return
    down, up = pair(parts)
    if down is None or up is None:
        there, missing = next(iter(keys.values())), "down (lora_A)" if down is None else "up (lora_B)"
        raise CheckpointError(f"lora: {where}: {there} has no {missing} beside it; the file is incomplete")
    if down.shape[0] != up.shape[1]:
        found = " and ".join(f"{key} {list(parts[part].shape)}" for part, key in keys.items() if part != "alpha")
        raise CheckpointError(f"lora: {where}: {found} are of different ranks; the file is damaged")
