"""What a picture may be given as: a PIL image, a file name, the bytes of a file, an open file, an array or a tensor.

Owns how each becomes a decoded picture, and what a list of pictures is. Knows nothing of references.
"""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from PIL import Image

from limner.errors import InvalidRequest
from limner.images.decode import check_header, decode, describe_source
from limner.images.limits import MAX_FILE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PictureSource", "as_list", "open_picture"]

PictureSource: TypeAlias = Union[
    Image.Image, str, os.PathLike[str], bytes, bytearray, memoryview, IO[bytes], "np.ndarray[Any, Any]", "Tensor"
]
"""A picture as callers have it. Arrays are (height, width, channels), tensors (channels, height, width), 1, 3 or 4 of them;
uint8 from 0 to 255, or floating point from 0 to 1, as calls return them."""
_ALLOWED = (
    "give a PIL image, a file name, bytes, an open file, an array (height, width, 3) or a tensor (3, height, width)"
)


def as_list(image: Any) -> list[Any]:
    """Return one picture, or an ordered list of them, as a list. Raises `InvalidRequest` for anything else.

    An array or tensor of four dimensions is a list of pictures, as calls return them.
    """
    if (isinstance(image, np.ndarray) or _is_tensor(image)) and image.ndim == 4:
        image = list(image)
    if not isinstance(image, (list, tuple)):
        if not _is_picture(image):
            raise InvalidRequest("image", f"{type(image).__name__} is not a picture or a list of pictures; {_ALLOWED}")
        return [image]
    if not image:
        raise InvalidRequest("image", "an empty list has no reference; leave image out for text to image")
    return list(image)


def _is_picture(value: Any) -> bool:
    kinds = (Image.Image, str, os.PathLike, bytes, bytearray, memoryview, np.ndarray)
    return isinstance(value, kinds) or _is_tensor(value) or callable(getattr(value, "read", None))


def open_picture(image: Any, *, field: str) -> tuple[Image.Image, str]:
    """Return the decoded picture, and `field` with the file's name, for messages. Raises `InvalidRequest`."""
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if isinstance(image, (str, os.PathLike, bytes)):
        return decode(image, field=field), f"{field} {describe_source(image)}"
    if isinstance(image, np.ndarray):
        return _from_array(image, field=field), field
    if _is_tensor(image):
        return _from_tensor(image, field=field), field
    if not isinstance(image, Image.Image) and callable(getattr(image, "read", None)):
        data = _read(image, field=field)
        return decode(data, field=field), f"{field} {describe_source(data)}"
    if not isinstance(image, Image.Image):
        raise InvalidRequest(field, f"{type(image).__name__} is not a picture; {_ALLOWED}")
    check_header(image, b"", field=field)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequest(field, f"the picture is truncated or damaged ({error}); save it again") from None
    return image, field


def _read(file: Any, *, field: str) -> bytes:
    """Return what an open file holds, from its start, and leave it where it was."""
    try:
        at = file.tell() if file.seekable() else None
        if at is not None:
            file.seek(0)
        data = file.read(MAX_FILE_BYTES + 1)
        if at is not None:
            file.seek(at)
    except (AttributeError, OSError, ValueError) as error:
        raise InvalidRequest(field, f"the open file cannot be read ({error}); give a file name") from None
    if not isinstance(data, bytes):
        raise InvalidRequest(field, f"the open file gives {type(data).__name__}; open it in binary: open(name, 'rb')")
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(field, f"the open file has over {MAX_FILE_BYTES} bytes; scale the picture down")
    return data


def _is_tensor(value: Any) -> bool:
    """Return True for a torch tensor, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def _from_tensor(tensor: Any, *, field: str) -> Image.Image:
    shape = list(tensor.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3, 4)):
        last = len(shape) == 3 and shape[2] in (1, 3, 4)
        remedy = "use tensor.permute(2, 0, 1)" if last else "give one picture a tensor"
        raise InvalidRequest(field, f"a tensor of shape {shape} is not (channels, height, width); {remedy}")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.double()  # numpy has no bfloat16
    array = tensor.numpy()
    return _from_array(array if array.ndim == 2 else array.transpose(1, 2, 0), field=field)


def _from_array(array: np.ndarray[Any, Any], *, field: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        remedy = "use array.transpose(1, 2, 0)" if first else "give one picture an array"
        raise InvalidRequest(
            field, f"an array of shape {list(array.shape)} is not (height, width, channels) with 1, 3 or 4; {remedy}"
        )
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not 0 <= low <= high <= 1:  # also NaN
            remedy = "use (x + 1) / 2" if low >= -1 and high <= 1 else "divide by 255" if low >= 0 else "scale them"
            raise InvalidRequest(
                field, f"its values go from {low:g} to {high:g}; floating point values are from 0 to 1: {remedy}"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InvalidRequest(
            field, f"its values are {array.dtype}; allowed: uint8 from 0 to 255, or floating point from 0 to 1"
        )
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))
    check_header(image, b"", field=field)
    return image
