"""The three ways to the grid, what is reported of them, and the way back."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from tests.support.pictures import encoded
from tests.support.tiny import picture

from limner import InvalidRequest, ReferencePolicy
from limner.images import PreparedReference, prepare_reference, put_back

FITS = ("crop", "pad", "resize")


def as_image(prepared: PreparedReference) -> Image.Image:
    return Image.frombytes("RGB", prepared.report.processed_size, prepared.data)


def test_pad_repeats_the_edges() -> None:
    image = picture(100, 70)
    found = prepare_reference(image, policy=ReferencePolicy(fit="pad"))
    report = found.report
    assert report.describe() == "100x70, padded 6 left, 5 top, 6 right, 5 bottom, used as 112x80"
    assert report.box == (6, 5, 106, 75)
    assert report.source_box == (0, 0, 100, 70)
    values = np.asarray(as_image(found))
    assert np.array_equal(values[5:75, 6:106], np.asarray(image))
    assert np.array_equal(values[0], values[5])
    assert np.array_equal(values[:, -1], values[:, 105])


def test_resize_goes_to_the_nearest_multiples() -> None:
    image = picture(100, 70)
    found = prepare_reference(image, policy=ReferencePolicy(fit="resize"))
    assert found.report.describe() == "100x70, scaled to 96x64, used as 96x64"
    assert found.data == image.resize((96, 64), Image.Resampling.LANCZOS).tobytes()
    assert (found.report.box, found.report.source_box) == ((0, 0, 96, 64), (0, 0, 100, 70))


@pytest.mark.parametrize("fit", FITS)
def test_what_is_on_the_grid_stays(fit: str) -> None:
    """The policy is no part of the key but through pixels."""
    image = picture(96, 64)
    assert (
        prepare_reference(image, policy=ReferencePolicy(fit=fit)).report
        == prepare_reference(image, policy=ReferencePolicy()).report
    )


SIZES = ((128, 128), (160, 96), (96, 160))
LARGER = (*SIZES, (256, 256), (320, 192), (192, 320))


@pytest.mark.parametrize(
    ("size", "fit", "sizes", "pixels", "told"),
    [
        ((1200, 800), "crop", SIZES, 16384, "scaled to 160x107, cut 0 left, 5 top, 0 right, 6 bottom, used as 160x96"),
        ((1200, 800), "pad", SIZES, 16384, "scaled to 144x96, padded 8 left, 0 top, 8 right, 0 bottom, used as 160x96"),
        ((1200, 800), "resize", SIZES, 16384, "scaled to 160x96, used as 160x96"),
        ((80, 64), "crop", SIZES, 16384, "scaled to 160x128, cut 16 left, 0 top, 16 right, 0 bottom, used as 128x128"),
        ((165, 99), "crop", SIZES, 16384, "cut 2 left, 1 top, 3 right, 2 bottom, used as 160x96"),  # as for any model
        ((128, 128), "crop", LARGER, 65536, "used as 128x128"),
        ((200, 200), "crop", LARGER, 65536, "scaled to 128x128, used as 128x128"),  # it would be 192x192
        ((900, 1500), "pad", LARGER, 65536, "scaled to 192x320, used as 192x320"),
        ((900, 1500), "crop", LARGER, 20000, "scaled to 96x160, used as 96x160"),  # the cap holds
        ((1200, 800), "crop", SIZES, 9000, "scaled to 116x77, cut 2 left, 6 top, 2 right, 7 bottom, used as 112x64"),
        ((1200, 800), "crop", (), 16384, "scaled to 156x104, cut 6 left, 4 top, 6 right, 4 bottom, used as 144x96"),
    ],
)
def test_a_reference_has_a_size_that_the_model_has_learned(
    size: tuple[int, int], fit: str, sizes: tuple[tuple[int, int], ...], pixels: int, told: str
) -> None:
    image = picture(*size)
    policy = ReferencePolicy(fit=fit).for_model(pixels, sizes)
    found = prepare_reference(image, policy=policy)
    assert found.report.describe() == f"{size[0]}x{size[1]}, {told}"
    assert len(found.data) == 3 * found.report.processed_size[0] * found.report.processed_size[1]
    assert put_back(as_image(found), image, found.report).size == size
    assert ReferencePolicy(sizes=()).for_model(pixels, sizes).sizes == ()


@pytest.mark.parametrize("size", [(0, 16), (100, 100), (48, 64), (64,), (64.0, 64), [64, 64], 64])
def test_sizes_are_on_the_grid(size: Any) -> None:
    told = f"sizes: {size!r} is not (width, height), multiples of 16 of at least 64; give a tuple of such sizes"
    with pytest.raises(InvalidRequest, match=f"^{re.escape(told)}$"):
        ReferencePolicy(sizes=((64, 64), size))


@pytest.mark.parametrize("fit", FITS)
def test_put_back_to_the_pixel(fit: str) -> None:
    """Whatever the size, what was not scaled comes back exactly, and what the reference did not have is not touched."""
    rng = random.Random(1)
    for _ in range(25):
        size = (rng.randint(64, 200), rng.randint(64, 200))
        image = picture(*size)
        found = prepare_reference(image, policy=ReferencePolicy(fit=fit))
        result = as_image(found)
        back = put_back(result, image, found.report)
        if found.report.resized_to is None:
            assert back.tobytes() == image.tobytes(), size
        left, top, right, bottom = found.report.source_box
        red = np.asarray(put_back(Image.new("RGB", result.size, (255, 0, 0)), image, found.report))
        inside = np.zeros(size[::-1], bool)
        inside[int(np.ceil(top)) : int(bottom), int(np.ceil(left)) : int(right)] = True
        assert (red[inside] == (255, 0, 0)).all(), size
        assert np.array_equal(red[~inside], np.asarray(image)[~inside]), size


@pytest.mark.parametrize("fit", FITS)
def test_put_back_what_was_scaled(fit: str) -> None:
    """A gradient is where it was, to a quarter of a pixel."""
    ramp = np.tile(np.arange(250, dtype=np.uint8), (190, 1))
    image = Image.fromarray(np.stack([ramp, ramp, ramp], axis=-1))
    found = prepare_reference(image, policy=ReferencePolicy(fit=fit, max_pixels=100 * 100))
    assert found.report.resized_to is not None
    back = np.asarray(put_back(as_image(found), image, found.report)).astype(int)
    assert np.abs(back - np.asarray(image))[:, 8:-8].mean() < 0.5
    assert np.abs(back - np.asarray(image))[:, 8:-8].max() <= 2


@pytest.mark.parametrize("fit", FITS)
def test_the_cap_holds(fit: str) -> None:
    rng = random.Random(2)
    for _ in range(60):
        width, height, cap = rng.randint(64, 500), rng.randint(64, 500), rng.choice([64 * 64, 5000, 90_000])
        if max(width / height, height / width) > 4:
            continue
        policy = ReferencePolicy(fit=fit, max_pixels=cap)
        found = prepare_reference(Image.new("RGB", (width, height)), policy=policy).report
        w, h = found.processed_size
        assert w % 16 == h % 16 == 0
        assert w * h <= cap
        assert len(set(prepare_reference(Image.new("RGB", (width, height), (9, 9, 9)), policy=policy).data)) == 1


def test_turned_pictures() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = picture(70, 100)
    data = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    report = prepare_reference(data, policy=ReferencePolicy()).report
    assert (report.original_size, report.upright_size, report.source_box) == ((100, 70), (70, 100), (3, 2, 67, 98))
    back = put_back(as_image(prepare_reference(data, policy=ReferencePolicy())), data, report)
    assert back.tobytes() == upright.tobytes()


def test_refusals() -> None:
    with pytest.raises(InvalidRequest, match="fit: 'cover' is not one of crop, pad, resize"):
        ReferencePolicy(fit="cover")
    found = prepare_reference(picture(100, 70), policy=ReferencePolicy())
    with pytest.raises(InvalidRequest, match="result: is 64x64, the reference was used as 96x64; draw in that size"):
        put_back(picture(64, 64), picture(100, 70), found.report)
    with pytest.raises(InvalidRequest, match="original: is 64x64, not the picture of the report"):
        put_back(as_image(found), picture(64, 64), found.report)
