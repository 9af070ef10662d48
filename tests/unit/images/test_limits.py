"""Small files that make a decoder work long or take much memory: refused by their structure, before any decoder opens them."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin
from tests.support.pictures import chunk, encoded, with_chunks, with_scans, with_segments
from tests.support.tiny import picture

from limner import InvalidRequest
from limner.images import decode, limits

PNG, JPEG, WEBP = (encoded(picture(64, 64), kind) for kind in ("PNG", "JPEG", "WEBP"))


def deflated(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def exif_segment(size: int) -> bytes:
    return segment(0xE1, b"Exif\0\0" + bytes(size))


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def vp8x(width: int, height: int, *, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes((flags, 0, 0, 0)) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


PIXELS = (b"VP8 ", WEBP[20:])
TEN_MIB = 10 << 20

HOSTILE: dict[str, tuple[bytes, str]] = {
    "scans": (
        with_scans(picture(64, 64), 101),
        "it has 11[0-9] scans; at most 100 are allowed at 64x64; save it again",
    ),
    "scans behind reserved markers": (
        with_scans(picture(64, 64), 101, before=b"\xff\x02\xff\xff"),
        "scans; at most 100 are allowed",
    ),
    "scans of a large picture": (
        with_scans(Image.new("RGB", (8000, 8000)), 11, quality=1),
        "it has 21 scans; at most 20 are allowed at 8000x8000",
    ),
    "jpeg segments": (with_segments(JPEG, segment(0xFE, b"") * 1001), "over 1000 blocks"),
    "jpeg exif in many parts": (
        with_segments(JPEG, exif_segment(60_000) * 20),
        "EXIF data has 1[0-9]{6} bytes; at most",
    ),
    "jpeg profile": (with_segments(JPEG, segment(0xE2, bytes(65_000)) * 270), "over 16777216 bytes.*without metadata"),
    "png chunks": (with_chunks(PNG, chunk(b"tEXt", b"k\0v") * 1001), "over 1000 blocks"),
    "png empty pixel chunks": (with_chunks(PNG, chunk(b"IDAT", b"") * 100_001), "over 100000 IDAT chunks"),
    "png zTXt": (with_chunks(PNG, chunk(b"zTXt", b"k\0\0" + deflated(TEN_MIB)) * 2), "over 16777216 bytes"),
    "png iTXt": (with_chunks(PNG, chunk(b"iTXt", b"k\0\1\0en\0k\0" + deflated(TEN_MIB)) * 2), "over 16777216 bytes"),
    "png iCCP": (with_chunks(PNG, chunk(b"iCCP", b"k\0\0" + deflated(TEN_MIB)) * 2), "over 16777216 bytes"),
    "png eXIf": (with_chunks(PNG, chunk(b"eXIf", bytes(2 << 20))), "EXIF data has 2097152 bytes; at most 1048576"),
    "png frames": (
        with_chunks(PNG, chunk(b"acTL", struct.pack(">II", 5000, 0))),
        r"animated \(5000 frames\); save one frame",
    ),
    "webp chunks": (riff(vp8x(64, 64), PIXELS, *[(b"ABCD", b"")] * 1000), "over 1000 blocks"),
    "webp frames": (riff(vp8x(64, 64, flags=2), *[(b"ANMF", bytes(16))] * 900), r"animated \(900 frames\)"),
    "webp canvas": (riff(vp8x(16384, 16384), PIXELS), "16384x16384 is over 64000000 pixels"),
    "webp exif": (riff(vp8x(64, 64, flags=8), PIXELS, (b"EXIF", bytes(2 << 20))), "EXIF data has 2097152 bytes"),
    "webp xmp": (riff(vp8x(64, 64, flags=4), PIXELS, (b"XMP ", bytes(17 << 20))), "over 16777216 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_before_a_decoder_opens_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, message = HOSTILE[name]

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the decoder was asked")

    monkeypatch.setattr(Image, "open", opened)
    with pytest.raises(InvalidRequest, match=message) as caught:
        decode(data, field="image 3")
    assert str(caught.value).startswith("image 3 ")


def test_files_as_cameras_and_editors_write_them_are_read() -> None:
    info = PngImagePlugin.PngInfo()
    for i in range(100):
        info.add_itxt(f"k{i}", "x" * 10_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [
        encoded(picture(64, 64), "PNG", pnginfo=info, icc_profile=bytes(500_000), exif=exif),
        encoded(
            picture(64, 64), "JPEG", progressive=True, icc_profile=bytes(3_000_000), exif=exif, comment=b"c" * 60_000
        ),
        encoded(picture(64, 64), "WEBP", icc_profile=bytes(500_000), exif=exif, xmp=bytes(1_000_000)),
        with_scans(picture(64, 64), 80),
        JPEG + b"\xff\xda" * 5000,  # behind the end, where a phone puts previews
        with_segments(JPEG, segment(0xE1, b"\xff\xda" * 5000)),  # inside another segment, as in a preview
    ]
    for data in good:
        assert decode(data).size == (64, 64)


def test_a_damaged_file_is_the_decoders_part() -> None:
    for data in (PNG, JPEG, WEBP):
        for end in range(len(data)):
            limits.check_structure(data[:end], field="image")


def test_the_largest_progressive_picture_that_libjpeg_writes_is_allowed() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(buffer, "JPEG", progressive=True, quality=1)
    limits.check_structure(buffer.getvalue(), field="image")
