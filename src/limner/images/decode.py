"""Decode picture files, with limits that are checked before any pixel is decoded.

Owns the checks of a file's header; those of its structure are in `limits`. Knows nothing of references.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from limner.errors import InvalidRequest
from limner.files import printable
from limner.images.formats import PIL_FORMATS, other_file
from limner.images.limits import MAX_DECODED_PIXELS, MAX_FILE_BYTES, check_animation, check_size, check_structure

__all__ = ["check_header", "decode", "describe_source", "read_file"]


def read_file(path: str | os.PathLike[str], *, field: str, too_large: str = "; scale it down") -> bytes:
    """Return the bytes of a picture file of at most `MAX_FILE_BYTES`; `too_large` ends the message for a larger one.

    Raises `InvalidRequest` that names `field`.
    """
    shown = describe_source(path)
    if not shown:
        raise InvalidRequest(field, "'' is no file name; give a picture file")
    try:
        file = Path(path)
        if file.is_dir():
            raise InvalidRequest(field, f"{shown} is a folder; give a picture file in it")
        if file.exists() and not file.is_file():
            raise InvalidRequest(field, f"{shown} is not a file; give a picture file")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest(field, f"{shown} is over {MAX_FILE_BYTES} bytes{too_large}")
        return file.read_bytes()
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(field, f"{shown} is not a file name ({error})") from None
    except OSError as error:
        raise InvalidRequest(
            field, f"{shown} cannot be read ({error.strerror or error}); give a picture file"
        ) from error


def decode(source: str | os.PathLike[str] | bytes, *, field: str = "image") -> Image.Image:
    """Return the picture in a file or its bytes, fully decoded.

    Raises `InvalidRequest` that names `field` and the remedy.
    """
    shown = describe_source(source)
    data = source if isinstance(source, bytes) else read_file(source, field=field)
    check_structure(data, field=f"{field} {shown}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower, and an error
            image = Image.open(io.BytesIO(data), formats=sorted(PIL_FORMATS))
    except UnidentifiedImageError:
        found = other_file(data)
        what, remedy = ("", "convert it to one") if found is None else (f" but {found[0]}", found[1])
        raise InvalidRequest(field, f"{shown} is not a PNG, JPEG or WebP picture{what}; {remedy}") from None
    except Image.DecompressionBombError as error:
        raise InvalidRequest(field, f"{shown}: {error}; at most {MAX_DECODED_PIXELS} pixels are allowed") from None
    except Exception as error:  # Pillow's decoders raise many types: struct.error, EOFError, KeyError, ...
        raise InvalidRequest(field, f"{shown} is damaged ({error}); save it again") from None
    check_header(image, data, field=f"{field} {shown}")
    try:
        image.load()
    except Exception as error:
        raise InvalidRequest(field, f"{shown} is truncated or damaged ({error}); save it again") from None
    return image


def check_header(image: Image.Image, data: bytes, *, field: str) -> None:
    """Refuse pictures that are too large, animated or of 16 bits a channel. Raises `InvalidRequest`.

    Nothing is decoded for this. `data` are the bytes of the file, or none for a picture in memory.
    """
    check_size(*image.size, field=field)
    if image.format != "MPO":  # a JPEG followed by previews
        check_animation(getattr(image, "n_frames", 1), field=field)
    if image.format == "PNG" and len(data) > 24 and data[24] == 16:
        raise InvalidRequest(field, "it has 16 bits a channel; save it with 8")


def describe_source(source: str | os.PathLike[str] | bytes) -> str:
    """Return how a message names a picture: its file name, or the number of its bytes."""
    return f"({len(source)} bytes)" if isinstance(source, bytes) else printable(os.fspath(source))
