"""What a call may ask for beyond prompt and references: how much each reference counts, and what of a picture is repainted.

Owns the checks of single values. Does not know how any of it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from limner.errors import InvalidRequest
from limner.kinds import ModelKind
from limner.requests import Control

__all__ = [
    "MASK_BLUR",
    "PerPrompt",
    "Weights",
    "check_names",
    "check_reference_guidance",
    "check_reuse",
    "check_strength",
    "check_weights",
]

MASK_BLUR = 8
"""Pixels of the canvas over which a repainted place fades into its surroundings."""
_MAX_WEIGHT = 10.0
"""Of a reference, and of reference guidance; pictures fall apart long before."""


Weights = tuple[tuple[float, ...], ...]
"""Of each reference, for each step or once for all."""


class PerPrompt(tuple[Any, ...]):
    """Values of an argument for each prompt of a call, where callers give one for all; made by `Pipeline.draw`."""

    __slots__ = ()


def check_weights(
    weights: Sequence[float] | Sequence[Sequence[float]] | None, *, num_references: int, num_steps: int
) -> Weights | None:
    """Return the weights of all references for each step, or once for all steps. Raises `InvalidRequest`."""
    if weights is None:
        return None
    rows: list[Any] = list(weights) if isinstance(weights, (list, tuple)) and weights else [weights]
    per_step = rows if all(isinstance(row, (list, tuple)) for row in rows) else [rows]
    if len(per_step) not in (1, num_steps):
        raise InvalidRequest(
            "reference_weights",
            f"there are lists for {len(per_step)} of {num_steps} steps that are drawn; give one for each",
        )
    for row in per_step:
        if not all(_is_number(w) and 0 <= w <= _MAX_WEIGHT for w in row):
            raise InvalidRequest(
                "reference_weights", f"{weights!r} are not numbers of 0 to {_MAX_WEIGHT}, one for each reference"
            )
        if len(row) != num_references:
            raise InvalidRequest(
                "reference_weights", f"there are {len(row)} for {num_references} references; give one for each"
            )
    return tuple(tuple(float(w) for w in row) for row in per_step)


def check_reference_guidance(scale: float, num_references: int) -> float:
    """Return a scale of reference guidance. Raises `InvalidRequest`."""
    if not (_is_number(scale) and 0 <= scale <= _MAX_WEIGHT):
        raise InvalidRequest(
            "reference_guidance", f"{scale!r} is not a number of 0 to {_MAX_WEIGHT}; 1 is none, people use about 1.5"
        )
    if scale != 1 and not num_references:
        raise InvalidRequest("reference_guidance", "needs references; leave it out for text to image")
    return float(scale)


def check_reuse(reuse: str | None, *, kind: ModelKind) -> None:
    """Raise `InvalidRequest` unless K/V can be used again so."""
    if reuse not in (None, "step0"):
        raise InvalidRequest("reuse", f"{reuse!r} is not one of None, 'step0'")
    if reuse is not None and not kind.joint:
        raise InvalidRequest("reuse", "is for models with joint references; the K/V of this one are kept exactly")


def check_strength(strength: float | None) -> float:
    """Return a strength in (0, 1]; None is 1. Raises `InvalidRequest`."""
    if strength is None:
        return 1.0
    if not (_is_number(strength) and 0 < strength <= 1):
        raise InvalidRequest("strength", f"{strength!r} is not a number over 0, at most 1; 1 draws all steps")
    return float(strength)


def check_names(control: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for a control that there is not."""
    for name in control:
        if name not in Control.__annotations__:
            raise InvalidRequest(name[:40], f"is not one of {', '.join(Control.__annotations__)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
