"""Preparing references: the same pixels as diffusers, and a report of every change."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import ExifTags, Image
from tests.support.pictures import encoded
from tests.support.tiny import picture

from limner import InvalidRequest, ReferencePolicy
from limner.images import prepare_canvas, prepare_reference, to_pixels

POLICY = ReferencePolicy()


def test_refuses_policies() -> None:
    for changes in (
        {"max_pixels": -5},
        {"max_pixels": 0},
        {"min_side": 0},
        {"max_aspect": 0.5},
        {"max_pixels": float("nan")},
    ):
        with pytest.raises(InvalidRequest, match=f"{next(iter(changes))}: .* is not allowed; use"):
            ReferencePolicy(**changes)
    with pytest.raises(InvalidRequest, match="would be scaled to 45x5, under 16 pixels; raise max_pixels=256"):
        prepare_reference(picture(576, 72), policy=ReferencePolicy(max_pixels=256))


def test_a_canvas_keeps_its_size() -> None:
    """On no grid and under no cap, but upright, in RGB, and with the refusals of references."""
    policy = ReferencePolicy(max_pixels=64 * 64)
    image = picture(131, 83)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    found = prepare_canvas(buffer.getvalue(), policy=policy)
    assert (found.report.processed_size, found.report.oriented, found.report.resized_to) == ((83, 131), True, None)
    assert found.data == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert found.computed_digest() == found.report.digest
    assert prepare_canvas(found, policy=policy) is found
    with pytest.raises(InvalidRequest, match="^canvas: 131x20 is too small"):
        prepare_canvas(picture(131, 20), policy=policy)
    with pytest.raises(InvalidRequest, match="^canvas: it is transparent in places"):
        prepare_canvas(Image.new("RGBA", (80, 80)), policy=policy)


def test_orientation_is_applied_and_said() -> None:
    upright = picture(64, 96)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees to show
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    found = prepare_reference(turned, policy=POLICY)
    assert found.report.oriented
    assert found.report.processed_size == (64, 96)
    assert torch.equal(found.pixels, prepare_reference(upright, policy=POLICY).pixels)
    assert "turned upright (EXIF)" in found.report.describe()


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (1000, 1100), (2000, 1500), (3000, 400), (1024, 1024)])
def test_same_pixels_as_diffusers(size: tuple[int, int]) -> None:
    """Cap, resize, crop and range, as the klein pipeline does it."""
    image = picture(*size)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    resized = processor._resize_to_target_area(image, 1024**2) if size[0] * size[1] > 1024**2 else image
    width, height = (side // 16 * 16 for side in resized.size)
    expected = processor.preprocess(resized, height=height, width=width, resize_mode="crop")
    found = prepare_reference(image, policy=POLICY)
    assert torch.equal(to_pixels(found.pixels), expected)
    assert found.report.processed_size == (width, height)
    assert found.report.original_size == size
    assert (found.report.resized_to is not None) == (size[0] * size[1] > 1024**2)


def test_report_says_what_was_cut() -> None:
    report = prepare_reference(picture(103, 66), policy=POLICY).report
    assert report.cut == (3, 1, 4, 1)
    assert report.describe() == "103x66, cut 3 left, 1 top, 4 right, 1 bottom, used as 96x64"
    capped = prepare_reference(picture(400, 400), policy=ReferencePolicy(max_pixels=64 * 64)).report
    assert capped.describe() == "400x400, scaled to 64x64, used as 64x64"


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = picture(64, 64).convert(mode)
    found = prepare_reference(image, policy=POLICY)
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_pixels_are_those_that_were_hashed() -> None:
    """They are made when asked for, from the bytes of the digest, whatever became of the picture since."""
    image = picture(64, 80)
    before = np.asarray(image).copy()
    found = prepare_reference(image, policy=POLICY)
    image.paste((255, 0, 0), (0, 0, 64, 80))
    assert hashlib.sha256(b"64x80:" + found.data).hexdigest() == found.report.digest
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), before)
    found.pixels.zero_()
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), before)


def test_digest_tells_pictures_apart() -> None:
    base = picture(64, 64)
    other = base.copy()
    other.putpixel((5, 5), tuple(255 - c for c in base.getpixel((5, 5))))
    tall, wide = Image.new("RGB", (64, 128)), Image.new("RGB", (128, 64))
    digests = {prepare_reference(image, policy=POLICY).report.digest for image in (base, other, tall, wide)}
    assert len(digests) == 4
    assert prepare_reference(encoded(base), policy=POLICY).report.digest in digests
