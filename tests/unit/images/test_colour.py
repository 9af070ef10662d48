"""Colour profiles: pictures become sRGB, with the numbers of LittleCMS; sRGB and no profile change nothing; nothing crashes."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from tests.support.pictures import encoded
from tests.support.tiny import picture

from limner import InvalidRequest, ReferencePolicy
from limner.images import PreparedReference, prepare_reference

POLICY = ReferencePolicy()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(*, space: bytes = b"RGB ", gamma: float = 2.2, name: bytes = b"Display P3") -> bytes:
    """A profile as of ICC.1:2001: primaries of Display P3 (or none, for gray), and one curve."""

    def number(x: float) -> bytes:
        return struct.pack(">i", round(x * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79
    tags = [
        (b"desc", text + b"\0" * (-len(text) % 4)),
        (b"cprt", b"text\0\0\0\0x\0\0\0"),
        (b"wtpt", xyz(0.9642, 1, 0.8249)),
    ]
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        red, green, blue = (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)
        tags += [(b"rXYZ", xyz(*red)), (b"gXYZ", xyz(*green)), (b"bXYZ", xyz(*blue))]
        tags += [(one, curve) for one in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags:
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4s4s4s4s4s", start + len(body), b"\0" * 4, b"\x02\x40\0\0", b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + number(0.9642) + number(1) + number(0.8249)
    return head + b"\0" * (128 - len(head)) + table + body


def prepared(source: Any, **policy: Any) -> PreparedReference:
    return prepare_reference(source, policy=ReferencePolicy(**policy))


def pixels(found: PreparedReference) -> Any:
    return found.pixels.permute(1, 2, 0).numpy()


def expected(image: Image.Image, data: bytes) -> Any:
    """Pillow's own conversion."""
    converted = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(data)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None
    return np.asarray(converted)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_display_p3_becomes_srgb(kind: str) -> None:
    data = encoded(picture(64, 64), kind, icc_profile=profile())
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    found = prepared(data)
    want = expected(plain, profile())
    assert np.abs(want.astype(int) - np.asarray(plain)).max() > 20  # it matters
    assert np.array_equal(pixels(found), want)
    assert found.report.profile == "Display P3, converted to sRGB"
    assert found.report.describe() == "64x64, colour profile Display P3, converted to sRGB, used as 64x64"
    assert found.report.digest == prepared(Image.fromarray(want)).report.digest  # the key is of pixels after conversion
    opened = Image.open(io.BytesIO(data))
    assert prepared(opened).report.digest == found.report.digest


@pytest.mark.parametrize("data", [None, b"", SRGB], ids=["none", "empty", "sRGB"])
def test_srgb_and_no_profile_change_nothing(data: bytes | None) -> None:
    image = picture(64, 64)
    before = prepared(image)
    found = prepared(encoded(image, icc_profile=data) if data != b"" else image)
    assert found.report == before.report
    assert found.data == before.data
    assert found.report.profile is None


@pytest.mark.parametrize("damage", ["short", "noise", "zeros", "cut", "huge"])
def test_damaged_profiles_are_told_and_not_used(damage: str) -> None:
    good = profile()
    data = {
        "short": b"icc",
        "noise": good[:132] + bytes(range(256)) * 2,
        "zeros": b"\0" * 400,
        "cut": good[:-40],
        "huge": good + b"\0" * (5 << 20),
    }[damage]
    image = picture(64, 64)
    image.info["icc_profile"] = data
    found = prepared(image)
    assert found.data == prepared(picture(64, 64)).data
    assert found.report.profile is not None
    assert found.report.profile.startswith("not used: ")
    assert "colour profile not used: " in found.report.describe()


def test_profiles_of_other_modes() -> None:
    gray = picture(64, 64).convert("L")
    curve = profile(space=b"GRAY", gamma=1.0, name=b"linear")
    found = prepared(encoded(gray, icc_profile=curve))
    assert np.array_equal(pixels(found), expected(gray, curve))
    assert found.report.profile == "linear, converted to sRGB"

    palette = picture(64, 64).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(
        pixels(prepared(encoded(palette, icc_profile=profile()))), expected(palette.convert("RGB"), profile())
    )

    clear = picture(64, 64).convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None] * 4, (1, 64))))
    data = encoded(clear, icc_profile=profile())
    over = Image.fromarray(expected(clear.convert("RGB"), profile())).convert("RGBA")
    over.putalpha(clear.getchannel("A"))
    over = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), over)
    assert np.array_equal(pixels(prepared(data, background="white")), np.asarray(over.convert("RGB")))
    with pytest.raises(InvalidRequest, match="transparent in places"):
        prepared(data)

    wrong = prepared(encoded(picture(64, 64), icc_profile=curve))
    assert wrong.report.profile == "linear, not used: it is for GRAY pictures, this one is RGB"


def test_orientation_outlives_the_conversion() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    found = prepared(encoded(picture(96, 64), "JPEG", exif=exif, icc_profile=profile()))
    assert found.report.oriented
    assert found.report.processed_size == (64, 96)


def test_cmyk_is_refused_without_a_profile_that_says_what_it_means() -> None:
    image = picture(64, 64).convert("CMYK")
    with pytest.raises(InvalidRequest, match="colour mode is CMYK; convert it to RGB with its colour profile"):
        prepared(image)
    image.info["icc_profile"] = profile()
    with pytest.raises(InvalidRequest, match=r"CMYK.*Display P3, not used: it is for RGB pictures, this one is CMYK"):
        prepared(image)


def test_names_of_profiles_are_one_printable_line() -> None:
    found = prepared(encoded(picture(64, 64), icc_profile=profile(name=b"a\x1b[31m\nb" + b"c" * 200)))
    assert found.report.profile is not None
    assert found.report.profile.isprintable()
    assert len(found.report.profile) < 100
