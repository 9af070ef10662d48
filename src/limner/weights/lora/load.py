"""Load a LoRA: read it, translate it, and refuse what is not for this transformer. Files in, values out.

Knows nothing of strengths and of which adapters are active.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limner.errors import CheckpointError
from limner.model.lora import Kronecker, Update
from limner.weights.digest import digest_tensors
from limner.weights.lora.dialects import NamedMatrices
from limner.weights.lora.kinds import Group, Tensors, group_keys, refusal
from limner.weights.lora.scales import Scales
from limner.weights.lora.source import copy_tensors, read_lora, resolve_lora
from limner.weights.lora.updates import Base, check_values, updates_of

__all__ = ["LoraWeights", "hint", "load_lora"]

_logger = logging.getLogger("limner")
_TEXT_ENCODER = re.compile(r"(?:lora_te|lora_qwen|text_encoders?[\d._]|te\d?[._]|cond_stage_model\.|conditioner\.)")
_NORM = re.compile(r"(?:norm_(?:added_)?[qk]|(?:query|key)_norm)(?:[._]|$)|\.w_norm$")
_SHOWN = 12
"""Unused tensors that a message names; `LoraWeights.unknown` has them all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraWeights:
    """The updates of a LoRA by the names of the transformer's matrices.

    `digest` is a SHA-256 of names, tensors and scales, equal for the same LoRA in any dialect. `unknown` are the names of
    unused tensors (only with `strict=False`). `source` is for messages.
    """

    updates: Mapping[str, Update]
    digest: str
    source: str
    unknown: tuple[str, ...] = ()


def load_lora(
    source: str | os.PathLike[str] | Tensors,
    *,
    shapes: Mapping[str, tuple[int, int]],
    weight_name: str | None = None,
    strict: bool = True,
    base: Base | None = None,
) -> LoraWeights:
    """Read a LoRA for the matrices `shapes` (name to (N, K), as `limner.model.lora.matrix_shapes` gives them).

    `source` is a file, a folder or hub id (with the file's name in `weight_name` if there are several), or tensors by
    name, in any of `dialects.DIALECTS` and of `kinds.KINDS`. Unused tensors are an error; with `strict=False` they are
    logged and left out. `base` returns the weights of a matrix, which rotations (OFT) need. Raises `CheckpointError` and
    `InvalidRequest`.
    """
    if isinstance(source, Mapping):
        where, tensors, config = "the given tensors", copy_tensors(source), None
    else:
        file = resolve_lora(source, weight_name=weight_name)
        where, (tensors, config) = str(file), read_lora(file)
    updates, unknown = _convert(tensors, config, shapes=shapes, where=where, base=base)
    if not updates:
        raise CheckpointError(
            f"lora: {where}: none of its {len(tensors)} tensors is for a matrix of this transformer ({_some(unknown)}); it "
            f"is of another model or in a dialect that is not known{hint(unknown)}"
        )
    if unknown and strict:
        raise CheckpointError(
            f"lora: {where}: {len(unknown)} of its {len(tensors)} tensors are not for this transformer: {_some(unknown)}"
            f"{hint(unknown)}; give a LoRA of this model, or load it without them (strict=False)"
        )
    if unknown:
        _logger.warning("lora: %s: %d tensors are left out: %s", where, len(unknown), ", ".join(unknown))
    return LoraWeights(updates=updates, digest=_digest(updates), source=where, unknown=unknown)


def _convert(
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    *,
    shapes: Mapping[str, tuple[int, int]],
    where: str,
    base: Base | None,
) -> tuple[dict[str, Update], tuple[str, ...]]:
    """Return the updates by name of their matrix, and the names of tensors that are for none."""
    groups, unknown = group_keys(tensors, where=where)
    names, scales = NamedMatrices(shapes), Scales(config or {}, where=where)
    updates: dict[str, Update] = {}
    origins: dict[str, str] = {}
    for module, keys in groups.items():
        matrix = names.find(module)
        if matrix is None:
            unknown += keys.values()
            continue
        for part, key in keys.items():
            if problem := refusal(part):
                raise CheckpointError(f"lora: {where}: {key}: {problem}")
        group = Group(where=where, module=module, keys=keys, parts={part: tensors[key] for part, key in keys.items()})
        check_values(group)
        for target, update in updates_of(group, matrix, scales, base=base).items():
            if update.shape != shapes[target]:
                raise CheckpointError(
                    f"lora: {where}: {group}; that makes {list(update.shape)} for {target}, which is "
                    f"{list(shapes[target])} here: it is of another model"
                )
            if target in updates:
                raise CheckpointError(
                    f"lora: {where}: {group.key} and {origins[target]} are both for {target}; keep one"
                )
            updates[target], origins[target] = update, group.key
    if updates and scales.unused_patterns:
        _logger.warning("lora: %s: patterns of its configuration fit no matrix: %s", where, scales.unused_patterns)
    return dict(sorted(updates.items())), tuple(sorted(unknown))


def _digest(updates: Mapping[str, Update]) -> str:
    tensors = {f"{name}.{part}": value for name, update in updates.items() for part, value in update.tensors.items()}
    scales = [
        [name, type(u).__name__, repr(u.scale), *((u.first_row, u.num_rows) if isinstance(u, Kronecker) else ())]
        for name, u in updates.items()
    ]
    return hashlib.sha256(f"{json.dumps(scales)}\0{digest_tensors(tensors.items())}".encode()).hexdigest()


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def hint(unknown: tuple[str, ...]) -> str:
    """Return what is known of tensors that are for no matrix of the transformer, to end a message with; else ""."""
    if any(_TEXT_ENCODER.match(name) for name in unknown):
        return "; LoRAs of klein are for the transformer, those for a text encoder are not supported"
    if any(_NORM.search(name) for name in unknown):
        return "; changes of norms are not supported, since they are no matrices"
    if refused := next((problem for key in unknown if (problem := _refused(key))), None):
        return f"; {refused}"
    return ""


def _refused(key: str) -> str | None:
    """Return what is known of a tensor that is for no matrix here, and refused anywhere."""
    parts = [part for keys in group_keys([key], where="")[0].values() for part in keys]
    problem = refusal(parts[0]) if parts else None
    return f"{key} {problem}" if problem else None
