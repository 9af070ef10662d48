"""Masks: what is read, what is refused, and what is said."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tests.support.pictures import encoded

from limner import InvalidRequest
from limner.images import check_marked, describe_mask, mask_of_picture, picture_of_mask, read_alpha_mask, read_mask

SIZE = (48, 32)


def values() -> np.ndarray:
    mask = np.zeros((32, 48), np.uint8)
    mask[4:12, 8:40] = 255
    return mask


def grey(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask)


def test_every_kind_of_mask_reads_alike(tmp_path: Path) -> None:
    mask, picture = values(), grey(values())
    file = tmp_path / "mask.png"
    picture.save(file)
    shares = mask / np.float32(255)
    for kind, source in {
        "L": picture,
        "1": picture.convert("1"),
        "P": picture.convert("P"),
        "RGB": picture.convert("RGB"),
        "opaque RGBA": picture.convert("RGBA"),
        "opaque LA": picture.convert("LA"),
        "path": file,
        "name": str(file),
        "bytes": file.read_bytes(),
        "open file": io.BytesIO(file.read_bytes()),
        "bool": mask > 0,
        "uint8": mask,
        "(H, W, 1)": mask[..., None],
        "float32": shares,
        "float64": shares.astype(np.float64),
        "tensor": torch.from_numpy(shares),
        "(1, H, W)": torch.from_numpy(shares)[None],
        "(1, 1, H, W)": torch.from_numpy(shares)[None, None],
        "bfloat16": torch.from_numpy(shares).bfloat16(),
        "bool tensor": torch.from_numpy(mask > 0),
    }.items():
        found = read_mask(source, size=SIZE)
        assert found.dtype == np.uint8
        assert np.array_equal(found, mask), kind


def test_soft_masks_keep_their_values() -> None:
    ramp = np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))
    assert np.array_equal(read_mask(grey(ramp), size=SIZE), ramp)
    assert np.array_equal(read_mask(ramp.astype(np.float32) / 255, size=SIZE), ramp)
    half = read_mask(torch.full((32, 48), 0.5), size=SIZE)
    assert np.unique(half).tolist() == [128]


def test_the_mask_is_a_copy() -> None:
    mask = values()
    read_mask(mask, size=SIZE)[:] = 7
    assert np.array_equal(mask, values())


def test_ripples_of_lossy_files_are_black_or_white() -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[3:14, 5:30] = 255
    data = encoded(grey(mask), "JPEG", quality=60)
    raw, found = np.asarray(Image.open(io.BytesIO(data))), read_mask(data, size=SIZE)
    assert ((raw > 0) & (raw <= 15)).any()  # the file has them
    assert ((raw < 255) & (raw >= 240)).any()
    assert not ((found > 0) & (found <= 15)).any()
    assert not ((found < 255) & (found >= 240)).any()
    assert np.array_equal(found > 127, mask > 127)


def test_a_turned_file_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(grey(values()).transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert np.array_equal(read_mask(data, size=SIZE), values())


def test_transparent_is_repainted_only_where_that_is_asked() -> None:
    picture = Image.new("RGB", SIZE, (10, 90, 200))
    picture.putalpha(grey(255 - values()))
    assert np.array_equal(read_alpha_mask(picture, size=SIZE), values())
    assert np.array_equal(read_alpha_mask(encoded(picture), size=SIZE), values())
    with pytest.raises(
        InvalidRequest, match="mask_image: it is transparent in places, which could mean kept or repainted"
    ):
        read_mask(picture, size=SIZE)
    with pytest.raises(InvalidRequest, match=r"mask: it has no alpha channel \(its mode is RGB\); make what"):
        read_alpha_mask(picture.convert("RGB"), size=SIZE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((48, 32), np.uint8), "it is 32x48 and the canvas 48x32; scale it to the canvas' size, or turn it"),
        (np.zeros((16, 16), bool), "it is 16x16 and the canvas 48x32; scale it to the canvas' size$"),
        (np.zeros((32, 48, 3), np.uint8), r"its shape is \(32, 48, 3\); give \(height, width\)"),
        (
            (values() > 0).astype(np.uint8),
            "its largest value is 1 of 255; multiply it by 255, or give an array of bool",
        ),
        (grey((values() > 0).astype(np.uint8)), "its largest value is 1 of 255"),
        (values().astype(np.int64), "its values are int64; give bool, uint8 from 0 to 255 or floating point"),
        (values().astype(np.float32), r"floating point masks hold values from 0 \(kept\) to 1"),
        (np.full((32, 48), np.nan), "floating point masks hold values from 0"),
        (Image.new("RGB", SIZE, "red"), "it has colours; save it as grey: white is repainted"),
        (Image.new("F", SIZE), "its colour mode is F; save it as 8 bit grey"),
        (12, "int is not a mask; give a PIL image, a file, its name or bytes, an array or a tensor"),
        (io.StringIO("x"), "the file gives str, not bytes; open it with mode 'rb'"),
        (b"GIF89a", "is not a PNG, JPEG or WebP picture"),
    ],
)
def test_what_is_refused(source: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_mask(source, size=SIZE, field="mask_image")  # type: ignore[arg-type]
    assert str(caught.value).startswith("mask_image")


def test_full_masks_are_said() -> None:
    assert describe_mask(values()) == []
    (full,) = describe_mask(np.full((8, 8), 255, np.uint8), field="mask")
    assert full == "mask: it is white everywhere, so nothing of the canvas is kept; black is kept"


def test_a_mask_is_kept_as_a_picture() -> None:
    kept = picture_of_mask(values())
    assert kept.report.processed_size == SIZE
    assert np.array_equal(mask_of_picture(kept), values())
    check_marked(values(), field="mask")
    with pytest.raises(InvalidRequest, match="^mask: no pixel is transparent, so nothing would be drawn"):
        check_marked(np.zeros((32, 48), np.uint8), field="mask", marked="transparent")
