"""What a row of a manifest repaints, how much its references count, and its LoRAs: its fields, and what they ask for.

Owns how their files are found. Their names are `limner.requests`'; what they mean, what they may be, and whether they
fit together, is `limner.pipeline`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from limner.errors import InvalidRequest
from limner.images.reference import ASK_BACKGROUND
from limner.images.sources import open_picture
from limner.pipeline import Pipeline
from limner.pipeline.canvas import Canvas
from limner.pipeline.together import canvases_of
from limner.requests import CONTROL_FIELDS, Control, EditRequest, read_loras, repaints, warning_with_mask, with_mask

__all__ = ["canvas_values", "open_row", "read_control", "renamed", "repaints_first", "row_warnings"]

_FILES = ("mask", "canvas")
_OTHERWISE = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
"""Fields of a row that are called otherwise than the arguments of a call."""


def read_control(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a row, by their names there; what is null is left out.

    Raises `InvalidRequest` for one that is of another type than rows have.
    """
    found = {name: values[name] for name in CONTROL_FIELDS if values.get(name) is not None}
    for name, value in found.items():
        if (check := _CHECKS.get(name)) is not None:
            check(name, value)
    return found


def repaints_first(fields: Mapping[str, Any]) -> bool:
    """Whether the first reference of a row is repainted."""
    return "canvas" not in fields and repaints({CONTROL_FIELDS[name]: value for name, value in fields.items()})


def open_row(
    request: EditRequest, fields: Mapping[str, Any], *, base: Path, first: str | None, pipe: Pipeline
) -> EditRequest:
    """Return a request with the controls of a row, opened. It has no references but, if it is repainted, the first.

    `base` is the folder of the manifest, `first` the row's first reference. Raises `InvalidRequest`, with the row's names.
    """
    if not fields:
        return request
    canvas = None
    if repaints_first(fields):
        if first is None:
            raise InvalidRequest("references", "there are none to repaint; name the picture there first, or as canvas")
        canvas = open_picture(str(base / first), field="references")[0]
    control = {CONTROL_FIELDS[name]: str(base / x) if name in _FILES else x for name, x in fields.items()}
    try:
        return pipe.opened(replace(request, control=cast("Control", control), canvas=canvas))
    except InvalidRequest as error:
        raise renamed(error) from None


def renamed(error: InvalidRequest) -> InvalidRequest:
    """Return an error of a call in the words that a row has for its fields."""
    error = with_mask(error)
    field, problem = error.field, error.problem.replace(ASK_BACKGROUND, "limner batch --background white")
    if field == "image 1" or field.startswith("image 1 "):
        field = "references" + field.removeprefix("image 1")
    elif field in ("width", "height"):
        field, problem = "size", f"{field} {problem}"
    return InvalidRequest(_OTHERWISE.get(field, field), problem)


def canvas_values(opened: EditRequest) -> dict[str, Any] | None:
    """Return values of JSON that differ wherever another picture or mask, or another way to draw it, is asked for."""
    canvas = _canvas_of(opened)
    if canvas is None:
        return None
    picture = hashlib.sha256(f"{canvas.picture.mode} {canvas.picture.size}".encode())
    picture.update(canvas.picture.tobytes())
    return {**canvas.metadata, "picture": picture.hexdigest()}


def row_warnings(opened: EditRequest) -> list[str]:
    """Return what is to be said of the mask, under the name that it has in a row."""
    canvas = _canvas_of(opened)
    return [] if canvas is None else [warning_with_mask(text) for text in canvas.warnings]


def _canvas_of(opened: EditRequest) -> Canvas | None:
    """Return the canvas of the one image of an opened request."""
    return next(iter(canvases_of(opened)), None)


# Checks of single fields


def _check_file(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(name, f"{_short(value)} is not the name of a file")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest(name, f"{value!r} is not valid Unicode; write it as UTF-8") from None


def _check_expand(name: str, value: Any) -> None:
    if not isinstance(value, (list, dict)):
        raise InvalidRequest(name, f'{_short(value)} is not [left, top, right, bottom] or {{"size": [width, height]}}')


def _check_weights(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise InvalidRequest(name, f"{_short(value)} is not a list of numbers, one for each reference")


def _check_loras(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InvalidRequest(name, f'{_short(value)} is not names with strengths, as {{"style": 0.8}}')
    read_loras(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "mask": _check_file,
    "canvas": _check_file,
    "expand": _check_expand,
    "reference_weights": _check_weights,
    "loras": _check_loras,
}
"""Types that a call takes and a row does not. The pipeline checks the rest."""
