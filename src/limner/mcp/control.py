"""From the arguments of an edit to its references and what is asked beyond them: what is repainted, what references count.

Owns what the arguments mean to `limner.requests.Control`. Knows nothing of the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from limner.errors import InvalidRequest
from limner.images import PreparedReference
from limner.mcp.inputs import EditInputs, GenerateInputs
from limner.mcp.pictures import PictureReader
from limner.requests import CONTROL_VALUES, Control, repaints

__all__ = ["Asked", "read_asked"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Asked:
    """The references of a call, in order, and what is asked beyond them. `canvas`: the first of them is repainted."""

    references: tuple[PreparedReference, ...] = ()
    control: Control = field(default_factory=lambda: Control())
    canvas: PreparedReference | None = None


async def read_asked(pictures: PictureReader, inputs: GenerateInputs | EditInputs) -> Asked:
    """Read the pictures of a call. Raises `InvalidRequest`."""
    values = {name: value for name in CONTROL_VALUES if (value := getattr(inputs, name, None)) is not None}
    control = cast("Control", values)
    if isinstance(inputs, GenerateInputs):
        return Asked(control=control)
    is_repainted = repaints(control, mask=inputs.mask)
    if not is_repainted and inputs.canvas is not None:
        raise InvalidRequest("canvas", "says which picture is repainted; give one of mask, expand, strength, preserve")
    is_first = is_repainted and inputs.canvas is None
    references = await pictures.read(inputs.pictures, first_whole=is_first)
    if not is_repainted:
        return Asked(references=references, control=control)
    canvas = references[0] if inputs.canvas is None else await pictures.read_canvas(inputs.canvas)
    if inputs.mask is not None:
        control["mask_image"] = await pictures.read_mask(inputs.mask, size=canvas.report.processed_size)
    if not is_first:
        control["canvas"] = canvas
    return Asked(references=references, control=control, canvas=canvas if is_first else None)
