"""Leaving the rest alone: what a decoder did is undone, what was asked for stays."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from limner import InvalidRequest
from limner.images import preserve

BOX = (50, 40, 90, 70)


def scene(width: int = 256, height: int = 192, *, seed: int = 0) -> Image.Image:
    """Soft blobs, and a few hard edges."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8))
    image = blobs.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for n in range(6):
        draw.line((n * width // 6, 0, width // 2, height), fill=(240, 240, 20 * n), width=2)
    return image


def redrawn(image: Image.Image, *, seed: int = 1) -> Image.Image:
    """What a decoder makes of a picture: slightly blurred, with noise."""
    values = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    values = values + np.random.default_rng(seed).normal(0, 2, values.shape)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def edited(image: Image.Image, box: tuple[int, int, int, int] = BOX) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).ellipse(box, fill=(230, 20, 30))
    return image


def moved(image: Image.Image, dx: float, dy: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -dx, 0, 1, -dy), Image.Resampling.BICUBIC)


def away(image: Image.Image, box: tuple[int, int, int, int] = BOX, *, margin: int = 16) -> np.ndarray:
    """True further than `margin` pixels from a box, and from the border, where a moved picture has nothing to show."""
    mask = np.ones((image.height, image.width), bool)
    mask[box[1] - margin : box[3] + margin, box[0] - margin : box[2] + margin] = False
    mask[:8] = mask[-8:] = mask[:, :8] = mask[:, -8:] = False
    return mask


def same(a: Image.Image, b: Image.Image) -> np.ndarray:
    return (np.asarray(a) == np.asarray(b)).all(-1)


def test_an_unchanged_picture_comes_back_bit_for_bit() -> None:
    canvas = scene()
    for result in (canvas, redrawn(canvas)):
        found = preserve(canvas, result)
        assert found.share_kept == 1
        assert same(found.picture, canvas).all()
        assert not np.asarray(found.change).any()
        assert found.drift_pixels == pytest.approx((0, 0), abs=0.1)


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (2.5, -1.25), (-0.6, 0.8)])
@pytest.mark.parametrize("colour", [0, 5])
def test_drift_is_found_and_undone(shift: tuple[float, float], colour: int) -> None:
    canvas = scene()
    result = redrawn(moved(edited(canvas), *shift)).point(lambda v: min(round(0.99 * v + colour), 255))
    found = preserve(canvas, result)
    assert found.drift_pixels == pytest.approx(shift, abs=0.15)
    assert found.drift_colour == pytest.approx((colour - 1.3,) * 3, abs=1.2)
    assert same(found.picture, canvas)[away(canvas)].mean() > 0.999
    middle = np.asarray(found.picture)[50:60, 65:75].astype(int)
    assert np.abs(middle - (230, 20, 30)).max() < 24  # the edit is there, at its place
    assert 0.95 < found.share_kept < 0.981  # the ellipse is 1.9 % of the picture


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: image.point(lambda v: v // 2),  # darker
        lambda image: image.point(lambda v: min(255, v + 14)),  # a little lighter, all over
        lambda image: image.convert("L").convert("RGB"),
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: moved(image, 12, 0),
        lambda image: scene(seed=5),
    ],
)
def test_edits_of_the_whole_are_not_undone(edit) -> None:  # type: ignore[no-untyped-def]
    canvas = scene()
    result = redrawn(edit(canvas))
    found = preserve(canvas, result)
    error = np.abs(np.asarray(found.picture, np.int64) - np.asarray(result)).max(-1)
    assert (error <= 12).mean() > 0.98
    assert found.drift_pixels == (0, 0)


def test_small_and_faint_changes_are_not_undone() -> None:
    canvas = Image.new("RGB", (192, 128), (120, 140, 160))
    ImageDraw.Draw(canvas).line((20, 100, 60, 100), fill=(250, 250, 250))  # one pixel wide, and taken away
    ImageDraw.Draw(canvas).point((80, 110), fill=(0, 0, 0))  # a single pixel, too
    result = Image.new("RGB", canvas.size, (120, 140, 160))
    draw = ImageDraw.Draw(result)
    draw.rectangle((100, 20, 140, 60), fill=(129, 140, 160))  # a faint tint
    draw.text((20, 20), "word", fill=(0, 0, 0))
    found = np.asarray(preserve(canvas, redrawn(result)).picture).astype(int)
    assert np.abs(found[100, 22:58] - (120, 140, 160)).max() < 12
    assert found[25:55, 105:135, 0].mean() > 127
    assert np.abs(found[110, 80] - (120, 140, 160)).max() < 12
    assert (found[20:32, 20:46].min(-1) < 60).sum() > 20


def test_another_light_is_not_undone_where_contrast_hides_it() -> None:
    tiles = np.random.default_rng(0).integers(0, 240, (16, 24, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    canvas, result = Image.fromarray(tiles), Image.fromarray(tiles + np.uint8(11))
    found = preserve(canvas, result)
    assert found.share_kept == 0
    assert same(found.picture, result).all()


def test_a_change_that_fades_is_taken_to_where_it_is_faint() -> None:
    glow = np.clip(40 - 0.1 * np.hypot(*np.mgrid[-64:64, 0:1600].astype(float)), 0, None)
    canvas = Image.new("RGB", (1600, 128), (90, 90, 90))
    result = Image.fromarray((np.asarray(canvas) + glow[..., None]).round().astype(np.uint8))
    change = np.asarray(preserve(canvas, result).change)
    assert (change[glow > 6] == 255).all()
    assert not change[glow < 3].any()


def test_colours_of_the_change_are_corrected_with_the_rest() -> None:
    canvas = scene()
    result = edited(canvas).point(lambda v: min(255, v + 6))
    middle = np.asarray(preserve(canvas, result).picture)[50:60, 65:75]
    assert np.abs(middle.astype(int) - (230, 20, 30)).max() <= 2


def test_a_smaller_result_keeps_the_canvas_at_its_own_size() -> None:
    canvas = scene(512, 384)
    result = redrawn(edited(canvas, (100, 80, 180, 140)).resize((256, 192), Image.Resampling.LANCZOS))
    found = preserve(canvas, result)
    assert found.picture.size == found.change.size == canvas.size
    assert same(found.picture, canvas)[away(canvas, (100, 80, 180, 140), margin=40)].all()
    assert np.abs(np.asarray(found.picture)[105:115, 135:145].astype(int) - (230, 20, 30)).max() < 24


def test_the_map_says_what_was_taken() -> None:
    canvas = scene()
    result = redrawn(edited(canvas))
    found = preserve(canvas, result)
    change, picture = np.asarray(found.change), np.asarray(found.picture)
    assert np.array_equal(picture[change == 0], np.asarray(canvas)[change == 0])
    assert found.share_kept == (change == 0).mean()
    assert set(range(1, 255)) & set(np.unique(change).tolist())  # soft edges
    assert found.describe().startswith("kept 9")


def test_refuses_other_shapes() -> None:
    with pytest.raises(
        InvalidRequest, match="preserve: the canvas is 256x192 and the result 192x192, of another shape"
    ):
        preserve(scene(), scene(192, 192))
    with pytest.raises(ValueError, match="not RGB"):
        preserve(scene().convert("L"), scene())
