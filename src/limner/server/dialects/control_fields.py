"""What a request may ask for beyond prompt and references, in the fields that all dialects share.

Owns these wire schemas, and how pictures of a request become its canvas and mask. docs/control.md says what they mean,
docs/lora.md what `loras` are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from limner.errors import InvalidRequest
from limner.requests import CONTROL_VALUES, MAX_STEPS, repaints
from limner.server.access.keys import Owner
from limner.server.http.pictures import SentPicture
from limner.server.http.service import Service
from limner.server.jobs.records import JobRequest

__all__ = ["CONTROL_FIELDS", "ControlFields", "Expansion", "LoraFields", "control_of", "read_controls"]

_MOST = 16384
_Pixels = Annotated[int, Field(ge=0, le=_MOST, strict=True)]
_Weight = Annotated[float, Field(ge=0, le=10, strict=True)]
_MAX_TEXT = 20_000


def _from_text(value: object) -> object:
    """Read JSON where a form has the text of it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value[:_MAX_TEXT])
    except (RecursionError, ValueError):
        raise ValueError("is not JSON, as [1.0, 0.6]") from None


class Expansion(BaseModel):
    """New area around a picture: `expand` are pixels at (left, top, right, bottom), or `size` is the new (width, height).

    `anchor` says where the picture stands in the new size. `overlap` pixels of the picture are drawn again at the seam.
    """

    model_config = ConfigDict(extra="forbid")

    expand: list[_Pixels] | None = Field(None, min_length=4, max_length=4)
    size: list[_Pixels] | None = Field(None, min_length=2, max_length=2)
    anchor: str | None = Field(None, max_length=20)
    overlap: _Pixels | None = None


_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Strength = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class LoraFields(BaseModel):
    """The field of a body, with pictures or without, that says which LoRAs act."""

    loras: Annotated[Annotated[dict[_Name, _Strength], Field(max_length=64)] | None, BeforeValidator(_from_text)] = (
        Field(
            None,
            description="strengths of the loaded LoRAs that act, by name; {}: none acts; null: as the service was started",
        )
    )


class ControlFields(LoraFields):
    """Fields of a body, for pictures that are repainted and for references."""

    parts: ClassVar[tuple[type[BaseModel], ...]] = (Expansion,)

    strength: float | None = Field(
        None, gt=0, le=1, strict=True, description="share of the steps that are drawn over the picture"
    )
    expand: Annotated[
        Annotated[list[_Pixels], Field(min_length=4, max_length=4)] | Expansion | None, BeforeValidator(_from_text)
    ] = Field(None, description="new pixels at left, top, right and bottom of the picture, or its new size")
    mask_blur: int | None = Field(None, ge=0, le=1024, strict=True, description="pixels over which a mask fades out")
    padding_mask_crop: int | None = Field(
        None, ge=0, le=_MOST, strict=True, description="draw the mask and so many pixels around it, enlarged"
    )
    preserve: Literal["auto"] | None = Field(
        None, description="take what the edit did not change from the picture, without a mask"
    )
    reference_weights: Annotated[
        Annotated[
            list[_Weight | Annotated[list[_Weight], Field(min_length=1, max_length=16)]],
            Field(min_length=1, max_length=MAX_STEPS),
        ]
        | None,
        BeforeValidator(_from_text),
    ] = Field(
        None, description="what each reference counts, in order: 1 as it is; or a list of those, one for each step"
    )
    reference_guidance: float | None = Field(
        None, ge=0, le=10, strict=True, description="over 1 holds a likeness (about 1.5), at twice the time; 1: none"
    )


CONTROL_FIELDS = ("mask", "canvas", *CONTROL_VALUES)
"""Names of all fields, as `GET /v1/capabilities` lists them."""
assert set(CONTROL_VALUES) == set(ControlFields.model_fields)


def control_of(fields: LoraFields) -> dict[str, Any]:
    """Return what is asked for, as values of JSON by the names of `limner.requests.Control`."""
    found = {name: getattr(fields, name, None) for name in CONTROL_VALUES}
    if isinstance(found["expand"], Expansion):
        found["expand"] = found["expand"].model_dump(exclude_none=True)
    return {name: value for name, value in found.items() if value is not None}


async def read_controls(
    service: Service,
    owner: Owner,
    request: JobRequest,
    *,
    pictures: Sequence[SentPicture],
    control: dict[str, Any],
    canvas: SentPicture | None,
    mask: SentPicture | None,
    drawn: Literal["transparent", "white"],
    background: str | None,
    **options: Any,
) -> JobRequest:
    """Return a request with its pictures read: references, the canvas and the mask over it. `drawn` is that of `read_mask`.

    `options` are those of `PictureReader.read`. Raises `InvalidRequest` and `NotFound`.
    """
    first_whole = canvas is None and repaints(control, mask=mask)
    request = replace(
        request,
        control=control,
        pictures=await service.pictures.read(
            pictures, owner=owner, background=background, first_whole=first_whole, **options
        ),
    )
    if canvas is not None:
        read = await service.pictures.read_canvas(canvas, owner=owner, background=background)
        request = replace(request, canvas=read)
    if mask is None:
        return request
    if "expand" in control:
        raise InvalidRequest("expand", "a mask is given as well; expand first, and give a mask of the new size")
    size = await service.canvas_size(owner, request)
    if size is None:
        raise InvalidRequest(mask.field, "needs a picture to repaint; send canvas, or a picture")
    try:
        read = await service.pictures.read_mask(mask, owner=owner, size=size, drawn=drawn)
    except InvalidRequest as error:
        if canvas is not None or request.handle is None or error.code != "size":
            raise
        problem = f"{error.problem}: that of image 1 as it is kept. Or send the picture itself as canvas"
        raise InvalidRequest(error.field, problem, code=error.code) from None
    return replace(request, mask=read)
