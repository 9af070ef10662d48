"""The arguments of the tools: their names, types and bounds, and one line on what is wrong with those of a call.

The schemas that assistants read are made of these classes. Knows nothing of the protocol, of files and of models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limner.errors import InvalidRequest
from limner.grid import MIN_SIDE, PIXELS
from limner.options import ServiceOptions
from limner.requests import MAX_STEPS
from limner.spelling import meant

__all__ = ["EditInputs", "ForgetInputs", "GenerateInputs", "Inputs", "KeepInputs", "read_inputs"]

MAX_PICTURES = 16
"""References of one picture, as of a job of the service."""
MAX_SEED = 2**53 - 1
"""Readers of JSON that have one type of number round larger ones."""
_SIDE = f"in pixels, a multiple of {PIXELS}, at least {MIN_SIDE}"
_UNASKED = "Default: that in which image 1 is used, or the model's."
_PICTURES = (
    "Reference pictures in order: image 1, 2, ... of the prompt. Each is the path of a PNG, JPEG or WebP file in the "
    "allowed folder, the URI of kept references (limner://references/NAME for all of them, limner://references/NAME/1.png "
    "for one), or base64 (plain or as a data URL)."
)
I = TypeVar("I", bound="Inputs")  # noqa: E741


class Inputs(BaseModel):
    """What all tools' arguments share: an argument that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class _Drawing(Inputs):
    prompt: str = Field(description="What to draw or to change.")
    width: int | None = Field(None, strict=True, description=f"Width {_SIDE}. {_UNASKED}")
    height: int | None = Field(None, strict=True, description=f"Height {_SIDE}. {_UNASKED}")
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        strict=True,
        description="Seed of the first picture; the next has seed + 1. Default: drawn.",
    )
    steps: int | None = Field(
        None, ge=1, le=MAX_STEPS, strict=True, description="Number of steps; default: what the model was trained for."
    )
    guidance: float | None = Field(None, ge=0, le=100, description="Guidance scale of base models; others ignore it.")
    negative_prompt: str | None = Field(None, description="What guidance goes away from (base models).")
    loras: dict[str, float] | None = Field(
        None, description="Strengths of the LoRAs that act, by name, and no others. Default: as limner was started."
    )
    num_images: int = Field(1, ge=1, le=ServiceOptions.max_batch, strict=True, description="Pictures to draw.")
    save_as: str | None = Field(
        None,
        min_length=1,
        description="Also save the picture in the allowed folder under this new name, .png, .jpg, .jpeg or .webp; of "
        "several pictures they get -1, -2, ...",
    )
    answer: Literal["png", "jpeg", "webp", "none"] = Field(
        "png", description="Format of the pictures in the answer; none, with save_as, leaves them out."
    )


class GenerateInputs(_Drawing):
    """Arguments of `generate`."""


class EditInputs(_Drawing):
    """Arguments of `edit`."""

    pictures: Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES, description=_PICTURES)]
    mask: str | None = Field(
        None,
        description="What to repaint: a black and white picture of image 1's size, as path or base64. White is repainted, "
        "black stays, to the pixel beyond mask_blur; the result has the size of image 1.",
    )
    expand: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=4, max_length=4)] | None = Field(
        None, description="Continue image 1 beyond its edges: new pixels at [left, top, right, bottom]."
    )
    strength: float | None = Field(
        None, gt=0, le=1, description="Under 1: draw over image 1, which shows through the more the less this is."
    )
    preserve: Literal["auto"] | None = Field(
        None, description="auto: take what the edit did not change from image 1, to the pixel, without a mask."
    )
    canvas: str | None = Field(
        None, description="Repaint this picture (path or base64) instead of image 1. It is no reference then."
    )
    mask_blur: int | None = Field(
        None, ge=0, strict=True, description="Pixels over which a mask fades out; default: 8."
    )
    padding_mask_crop: int | None = Field(
        None, ge=0, strict=True, description="Draw the mask and so many pixels around it, enlarged."
    )
    reference_weights: Annotated[list[float], Field(min_length=1, max_length=MAX_PICTURES)] | None = Field(
        None, description="What each picture counts, in order: 1 as it is, less or more, 0 not at all."
    )
    reference_guidance: float | None = Field(
        None, ge=0, description="Over 1 holds a likeness (about 1.5), at twice the time."
    )


class KeepInputs(Inputs):
    """Arguments of `keep_references`."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="Letters, digits, - and _; what the URI ends in."
    )
    pictures: Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES, description=_PICTURES)]
    replace: bool = Field(False, strict=True, description="Whether other pictures that have this name are forgotten.")


class ForgetInputs(Inputs):
    """Arguments of `forget_references`."""

    name: str = Field(description="The name they were kept under.")


def read_inputs(kind: type[I], arguments: dict[str, Any]) -> I:
    """Return the arguments of a call. Raises `InvalidRequest` that names the first that is wrong."""
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        near = meant(field, known)
        hint = f"did you mean {near}? " if near else ""
        raise InvalidRequest(field, f"is not an argument of this tool; {hint}they are: {', '.join(known)}")
    if problem["type"] == "missing":
        raise InvalidRequest(field, "is missing; give it")
    given = repr(problem["input"])
    shown = given if len(given) <= 80 else f"{given[:80]}..."
    raise InvalidRequest(field, f"{shown} is not allowed: {problem['msg'][0].lower()}{problem['msg'][1:]}")
