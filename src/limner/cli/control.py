"""Options of `limner edit` that say how much references count, and what of a picture is repainted.

Owns how they are written on the command line. Their names are `limner.requests`', what they mean is `limner.pipeline`'s.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, cast

from limner.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

    from limner.requests import Control

__all__ = ["add_control", "control_of"]


def add_control(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("what is repainted")
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="picture of image 1's size: white is repainted, black stays, to the pixel beyond --mask-blur",
    )
    group.add_argument(
        "--expand", type=_margins, metavar="L,T,R,B", help="new pixels at left, top, right and bottom of image 1"
    )
    group.add_argument(
        "--strength", type=float, metavar="X", help="over 0 to 1: the share of the steps that are drawn over image 1"
    )
    group.add_argument(
        "--preserve", choices=("auto",), help="take what the edit did not change from image 1, without a mask"
    )
    group.add_argument("--canvas", metavar="FILE", help="repaint this picture instead of image 1; it is no reference")
    group.add_argument(
        "--mask-blur", type=int, metavar="PX", help="pixels over which the repainted place fades out (default: 8)"
    )
    group.add_argument(
        "--padding-mask-crop", type=int, metavar="PX", help="draw the mask and so many pixels around it, enlarged"
    )
    group = parser.add_argument_group("how much references count")
    group.add_argument(
        "--reference-weight",
        dest="reference_weights",
        action="append",
        type=float,
        metavar="X",
        help="weight of image 1, again for image 2, ...: 1 as it is, less or more, 0 not at all",
    )
    group.add_argument(
        "--reference-guidance", type=float, metavar="X", help="over 1 holds a likeness, at twice the time (about 1.5)"
    )


def control_of(args: argparse.Namespace, images: list[str]) -> tuple[Control, Image.Image | None]:
    """Return what is asked for, and image 1 as its file has it if it is repainted. Raises `InvalidRequest`."""
    from limner.requests import CONTROL_FIELDS, repaints

    # --lora says which are loaded, and how strongly they act
    given = {name: getattr(args, field) for field, name in CONTROL_FIELDS.items() if name != "loras"}
    found = cast("Control", {name: value for name, value in given.items() if value is not None})
    if not repaints(found) or args.canvas is not None:
        return found, None
    if not images:
        raise InvalidRequest("--canvas", "a pack holds no pictures; give the picture to repaint as --canvas FILE")
    from limner.images.sources import open_picture

    return found, open_picture(images[0], field="image 1")[0]


def _margins(text: str) -> tuple[int, int, int, int]:
    match = re.fullmatch(r"(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels, as 0,0,64,0")
    left, top, right, bottom = map(int, match.groups())
    return left, top, right, bottom
