"""Decoding picture files: what is refused, and before what work."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.pictures import encoded, png_header
from tests.support.tiny import picture

from limner import InvalidRequest, ReferencePolicy
from limner.images import decode, prepare_reference

POLICY = ReferencePolicy()


def animated() -> bytes:
    return encoded(picture(64, 64), "WEBP", save_all=True, append_images=[picture(64, 64, seed=1)], duration=50)


GOOD = encoded(picture(80, 64))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a PNG, JPEG or WebP"),
    "text": (b"hello" * 100, "is not a PNG, JPEG or WebP"),
    "gif": (encoded(picture(64, 64), "GIF"), "is not a PNG, JPEG or WebP"),
    "tiff": (encoded(picture(64, 64), "TIFF"), "is not a PNG, JPEG or WebP"),
    "truncated png": (GOOD[:-400], "truncated or damaged"),
    "truncated jpeg": (encoded(picture(200, 200), "JPEG")[:-900], "truncated or damaged"),
    "truncated webp": (encoded(picture(200, 200), "WEBP")[:-300], "truncated|damaged|not a PNG"),
    "png without pixels": (png_header(128, 128), "truncated or damaged"),
    "bomb": (png_header(9000, 9000), "9000x9000 is over 64000000 pixels; scale it down"),
    "huge bomb": (png_header(60000, 60000), "pixels"),
    "bomb that PIL warns of": (png_header(11000, 11000), "11000x11000 is over 64000000 pixels"),
    "animated": (animated(), r"animated \(2 frames\); save one frame"),
    "16 bit": (png_header(64, 64, depth=16), "16 bits a channel; save it with 8"),
    "16 bit grey": (encoded(Image.fromarray(np.full((64, 64), 40000, np.uint16))), "16 bits"),
    "cmyk": (
        encoded(picture(64, 64).convert("CMYK"), "JPEG"),
        "colour mode is CMYK; convert it to RGB with its colour profile",
    ),
    "alpha": (encoded(Image.new("RGBA", (64, 64), (1, 2, 3, 99))), "transparent in places; flatten it"),
    "palette alpha": (encoded(Image.new("P", (64, 64)), transparency=0), "transparent in places; flatten it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    file = tmp_path / "input.png"
    file.write_bytes(data)
    for source in (data, file, str(file)):
        with pytest.raises(InvalidRequest, match=message) as caught:
            prepare_reference(source, policy=POLICY, field="image 3")
        assert caught.value.field.startswith("image 3")
        assert isinstance(source, bytes) or "input.png" in str(caught.value)


def test_refuses_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"image: .*nothing.png cannot be read \(No such file"):
        decode(tmp_path / "nothing.png")
    with pytest.raises(InvalidRequest, match="is a folder; give a picture file in it"):
        decode(tmp_path)
    with pytest.raises(InvalidRequest, match="'' is no file name"):
        decode("")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\0\0\0\x18ftypheic", "picture but a HEIC picture, as phones take them; export it as JPEG"),
        (b"\0\0\0\x18ftypavif", "an AVIF picture; convert it, as with: avifdec"),
        (b"\0\0\0\x18ftypisom", "a video; save one frame"),
        (b"\xff\x0a", "a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n", "a JPEG XL picture"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file; develop it"),
        (b"II*\0\x08\0\0\0", "a TIFF, or a camera's raw file"),
        (b"GIF89a", "a GIF; save one frame as PNG"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x">', "an SVG drawing; draw it"),
        (b"%PDF-1.7", "a PDF; save one page"),
        (b"BM1234", "a BMP picture"),
        (b"\n<!doctype html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS; fetch the picture itself: git lfs pull"),
        (b"\x58\x01\0\0\0\0\0\0{", "a file of weights or a pack; a pack is given instead of pictures"),
        (b"", "an empty file"),
        (b"hello", "is not a PNG, JPEG or WebP picture; convert it to one"),
    ],
)
def test_says_what_another_file_is(start: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(start + b"\0" * 20 if start else b"")
    assert message in str(caught.value)


def test_refuses_what_is_not_a_file() -> None:
    for path in ("/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(InvalidRequest, match="is not a file|cannot be read|is not a file name"):
            decode(path)


def test_a_jpeg_with_previews_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    picture(128, 96).save(buffer, "MPO", save_all=True, append_images=[picture(64, 64)])
    assert prepare_reference(buffer.getvalue(), policy=POLICY).report.original_size == (128, 96)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """In a process that could not hold the pixels."""
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(30000, 30000))
    program = (
        "import resource, sys; from limner.images import decode; from limner import InvalidRequest\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)\n"
        "try: decode(sys.argv[1])\n"
        "except InvalidRequest as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, timeout=60)
    assert "pixels" in done.stdout, done.stderr
