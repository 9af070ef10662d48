"""Masks of the service: which pixels of a result are drawn, and which are kept of the first reference.

A mask goes the way of its reference: scaled and cropped alike, so that both fit to the pixel.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.images.decode import decode
from limner.images.reference import PreparedReference, ReferenceReport, prepare_reference

__all__ = ["keep_outside", "prepare_mask"]


def prepare_mask(
    data: bytes, *, reference: ReferenceReport, drawn: Literal["transparent", "white"], field: str = "mask"
) -> PreparedReference:
    """Return a mask for a reference that was processed as `reference` says: white where pixels are drawn, black elsewhere.

    `drawn` says what marks such pixels in the file. Raises `InvalidRequest` where the mask does not fit.
    """
    image = decode(data, field=field)
    left, top, right, bottom = reference.cut
    width, height = reference.processed_size
    added = reference.added
    content = (width - added[0] - added[2] + left + right, height - added[1] - added[3] + top + bottom)
    scaled = reference.resized_to or content
    upright = reference.upright_size or reference.original_size
    if reference.upright_size is None and reference.oriented and (upright[0] > upright[1]) != (scaled[0] > scaled[1]):
        upright = upright[1], upright[0]  # written by an earlier version
    if image.size != upright:
        raise InvalidRequest(
            field, "has {}x{} pixels, the first picture {}x{}; send them alike".format(*image.size, *upright)
        )
    if drawn == "white":
        grey = image.convert("L")
    elif "A" in image.getbands() or "transparency" in image.info:
        grey = image.convert("RGBA").getchannel("A").point(range(255, -1, -1))
    else:
        raise InvalidRequest(field, "has no transparency; make the pixels transparent that are to be drawn, as a PNG")
    if grey.getextrema()[1] == 0:
        raise InvalidRequest(field, f"no pixel is {drawn}, so nothing would be drawn; mark what is to change")
    if scaled != upright:
        grey = grey.resize(scaled, Image.Resampling.LANCZOS)
    grey = grey.crop((left, top, scaled[0] - right, scaled[1] - bottom))
    if any(added):  # padding continues the picture's edges, and the mask's
        padding = ((added[1], added[3]), (added[0], added[2]))
        grey = Image.fromarray(np.pad(np.asarray(grey), padding, mode="edge"))
    return prepare_reference(grey, policy=ReferencePolicy(max_pixels=width * height, max_aspect=1e9, min_side=PIXELS))


def keep_outside(drawn: Image.Image, *, first: PreparedReference, mask: PreparedReference) -> Image.Image:
    """Return a drawn picture with the pixels of the first reference wherever the mask is black; between, a blend.

    All three have one size.
    """
    size = first.report.processed_size
    kept = Image.frombytes("RGB", size, first.data)
    return Image.composite(drawn, kept, Image.frombytes("RGB", size, mask.data).convert("L"))
