"""Canvases: what is cut and put back; outside of the mask nothing changes, whatever was cropped or scaled."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from limner import InvalidRequest
from limner.images import CanvasPlan, cut, expand_canvas, feathered, known_box, plan_canvas, stitch

SIZES = ((128, 128), (160, 96), (96, 160))
LARGER = (*SIZES, (256, 256), (320, 192), (192, 320))


def noise(width: int, height: int, *, channels: int = 3, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8))


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int], value: int = 255) -> np.ndarray:
    mask = np.zeros(size[::-1], np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = value
    return mask


def random_plan(seed: int) -> CanvasPlan:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(20, 400)), int(rng.integers(20, 400)))
    mask = np.zeros(size[::-1], np.uint8)
    for _ in range(rng.integers(0, 4)):
        x, y, w, h = (int(rng.integers(0, high)) for high in (size[0], size[1], 150, 150))
        mask[y : y + h, x : x + w] = rng.choice([255, 255, 90])
    return plan_canvas(
        size,
        mask,
        max_pixels=int(rng.integers(4096, 60_000)),
        sizes=SIZES if seed % 2 else (),
        padding=int(rng.integers(0, 50)) if seed % 3 == 0 else None,
        mask_blur=int(rng.integers(0, 12)),
    )


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_pixels_outside_are_equal(start: int) -> None:
    for seed in range(start, start + 20):
        plan = random_plan(seed)
        channels = 4 if seed % 5 == 0 else 3
        canvas = noise(*plan.size, channels=channels, seed=seed)
        drawn = noise(*plan.drawn_size, seed=seed + 1)
        before, after = np.asarray(canvas), np.asarray(stitch(canvas, drawn, plan))
        weight = feathered(plan.mask, plan.mask_blur)
        assert np.array_equal(before[weight == 0], after[weight == 0]), seed
        assert (weight > 0)[plan.mask > 0].all(), seed
        assert (weight == 255)[plan.mask == 255].all(), seed
        near = np.asarray(Image.fromarray(plan.mask).filter(ImageFilter.MaxFilter(2 * plan.mask_blur + 1)))
        assert not weight[near == 0].any(), seed


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_what_is_drawn_fits_the_model_and_shows_the_mask(start: int) -> None:
    for seed in range(start, start + 20):
        plan = random_plan(seed)
        (width, height), (box_width, box_height) = plan.drawn_size, plan.box_size
        assert width % 16 == height % 16 == 0, seed
        assert min(width, height) >= 64, seed
        if seed % 2:
            assert plan.drawn_size in SIZES, seed
        # one scale for both sides, to half a pixel of the canvas
        lowest = max((box_width - 0.51) / width, (box_height - 0.51) / height)
        assert lowest <= min((box_width + 0.51) / width, (box_height + 0.51) / height), seed
        picture, mask = cut(noise(*plan.size), plan)
        assert picture.size == mask.size == plan.drawn_size
        assert (picture.mode, mask.mode) == ("RGB", "L")
        ys, xs = np.nonzero(feathered(plan.mask, plan.mask_blur))
        if ys.size:
            assert plan.box[0] <= xs.min(), seed
            assert xs.max() < plan.box[2], seed
            assert plan.box[1] <= ys.min(), seed
            assert ys.max() < plan.box[3], seed


def test_a_drawn_picture_that_is_unchanged_changes_nothing() -> None:
    canvas = noise(200, 150)
    plan = plan_canvas(canvas.size, rectangle(canvas.size, (30, 20, 90, 80)), max_pixels=1 << 20, mask_blur=6)
    picture, _ = cut(canvas, plan)
    assert plan.box == (-4, -5, 204, 155)  # not multiples of 16: continued at both sides
    assert np.array_equal(np.asarray(stitch(canvas, picture, plan)), np.asarray(canvas))


def test_the_feather_lies_around_the_mask() -> None:
    mask = rectangle((40, 30), (12, 10, 18, 16))
    assert feathered(mask, 4)[12, 6:24].tolist() == [0, 0, 51, 102, 153, 204, *[255] * 6, 204, 153, 102, 51, 0, 0]
    assert feathered(mask, 0) is mask
    plan = plan_canvas((64, 64), rectangle((64, 64), (12, 10, 18, 16)), max_pixels=1 << 20, mask_blur=4)
    mixed = stitch(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white"), plan)
    assert np.array_equal(np.asarray(mixed)[..., 0], feathered(plan.mask, 4))
    one = rectangle((9, 9), (4, 4, 5, 5))
    assert feathered(one, 1)[4].tolist() == [0, 0, 0, 255, 255, 255, 0, 0, 0]
    corner = feathered(rectangle((30, 30), (29, 29, 30, 30)), 9)
    assert corner[29, 29] == 255
    assert not corner[:20].any()


@pytest.mark.parametrize(
    ("size", "box", "options", "expected"),
    [
        # fits: whole, pixel by pixel, however small the mask
        ((1024, 1024), (10, 10, 40, 40), {}, ((0, 0, 1024, 1024), (1024, 1024))),
        ((1000, 700), (10, 10, 40, 40), {}, ((-4, -2, 1004, 702), (1008, 704))),
        ((40, 200), (0, 0, 20, 20), {}, ((-12, -4, 52, 204), (64, 208))),
        # too large: around the mask; enlarged if it is small; whole if it is everywhere
        ((4000, 3000), (1900, 1400, 2200, 1700), {}, ((1538, 1038, 2562, 2062), (1024, 1024))),
        ((4000, 3000), (2000, 1500, 2030, 1530), {}, ((1887, 1387, 2143, 1643), (1024, 1024))),
        ((2000, 1500), (0, 0, 2000, 1500), {}, ((-12, -2, 2011, 1501), (1184, 880))),
        # the margin that was asked for, at the size of the whole
        ((1024, 1024), (500, 500, 550, 550), {"padding": 32}, ((468, 468, 582, 582), (1024, 1024))),
        ((1024, 1024), (500, 500, 550, 550), {"padding": 0}, ((496, 496, 554, 554), (1024, 1024))),
        # a model bound to some sizes
        ((160, 96), (0, 0, 9, 9), {"sizes": SIZES, "max_pixels": 16384}, ((0, 0, 160, 96), (160, 96))),
        ((160, 128), (0, 0, 48, 128), {"sizes": SIZES, "max_pixels": 16384}, ((0, 0, 128, 128), (128, 128))),
        ((100, 100), (0, 0, 9, 9), {"sizes": SIZES, "max_pixels": 16384}, ((0, 0, 100, 100), (128, 128))),
        ((512, 512), (99, 99, 140, 140), {"sizes": SIZES, "max_pixels": 16384}, ((56, 56, 184, 184), (128, 128))),
        # some of them larger: those under the cap, and not enlarged without need
        ((128, 128), (0, 0, 9, 9), {"sizes": LARGER, "max_pixels": 65536}, ((0, 0, 128, 128), (128, 128))),
        ((200, 200), (0, 0, 9, 9), {"sizes": LARGER, "max_pixels": 65536}, ((0, 0, 200, 200), (256, 256))),
        ((200, 200), (0, 0, 9, 9), {"sizes": LARGER, "max_pixels": 16384}, ((0, 0, 41, 41), (128, 128))),
        ((512, 512), (99, 99, 140, 140), {"sizes": LARGER, "max_pixels": 65536}, ((38, 38, 202, 202), (256, 256))),
        (
            (128, 128),
            (50, 50, 60, 60),
            {"sizes": LARGER, "max_pixels": 65536, "padding": 11},
            ((39, 39, 71, 71), (128, 128)),
        ),
    ],
)
def test_the_box(size: tuple[int, int], box: tuple[int, int, int, int], options: dict, expected: tuple) -> None:
    options = {"max_pixels": 1024 * 1024, "mask_blur": 4, **options}
    plan = plan_canvas(size, rectangle(size, box), **options)
    assert (plan.box, plan.drawn_size) == expected
    assert plan.drawn_size[0] * plan.drawn_size[1] <= options["max_pixels"]


def test_an_empty_mask_draws_the_whole() -> None:
    plan = plan_canvas((100, 80), np.zeros((80, 100), np.uint8), max_pixels=1 << 20, padding=8, mask_blur=4)
    assert plan.box == (-6, 0, 106, 80)
    assert plan.report(plan.weight()).share == 0


def test_the_edge_and_its_mask_continue_the_canvas() -> None:
    size = (100, 80)
    plan = plan_canvas(size, rectangle(size, (0, 0, 10, 80)), max_pixels=1 << 20, mask_blur=0)
    picture, mask = (np.asarray(image) for image in cut(noise(*size), plan))
    assert np.array_equal(picture[:, :6], np.repeat(picture[:, 6:7], 6, axis=1))
    assert (mask[:, :16] == 255).all()
    assert not mask[:, 16:].any()


def test_transparent_pixels_keep_their_alpha_outside() -> None:
    canvas = noise(64, 64, channels=4)
    plan = plan_canvas(canvas.size, rectangle(canvas.size, (10, 10, 30, 30)), max_pixels=1 << 20, mask_blur=0)
    picture, _ = cut(Image.new("RGBA", canvas.size, (0, 0, 0, 0)), plan, background="lime")
    assert picture.getextrema() == ((0, 0), (255, 255), (0, 0))
    after = np.asarray(stitch(canvas, Image.new("RGB", plan.drawn_size, "red"), plan))
    assert after.shape == (64, 64, 4)
    assert (after[10:30, 10:30] == (255, 0, 0, 255)).all()
    assert np.array_equal(after[:, 30:], np.asarray(canvas)[:, 30:])


def test_the_report_is_one_line() -> None:
    plan = plan_canvas((4000, 3000), rectangle((4000, 3000), (2000, 1500, 2030, 1530)), max_pixels=1 << 20, mask_blur=4)
    assert plan.report(plan.weight()).scale == 4
    assert plan.report(plan.weight()).describe() == (
        "canvas 4000x3000, drawn from 1887,1387 to 2143,1643 as 1024x1024 (scale 4), 0.0% of it repainted"
    )
    whole = plan_canvas((64, 64), rectangle((64, 64), (0, 0, 32, 64)), max_pixels=1 << 20, mask_blur=0)
    assert whole.report(whole.weight()).describe() == "canvas 64x64, drawn whole as 64x64, 50.0% of it repainted"


def test_refuses() -> None:
    mask = np.zeros((64, 64), np.uint8)
    for field, options in {
        "mask_blur": {"mask_blur": -1},
        "padding_mask_crop": {"mask_blur": 0, "padding": 1.5},
    }.items():
        with pytest.raises(InvalidRequest, match=f"{field}: .* is not a whole number of pixels from 0; use 0"):
            plan_canvas((64, 64), mask, max_pixels=4096, **options)  # type: ignore[arg-type]
    plan = plan_canvas((64, 64), mask, max_pixels=4096, mask_blur=0)
    with pytest.raises(ValueError, match="mask"):
        plan_canvas((64, 32), mask, max_pixels=4096, mask_blur=0)
    with pytest.raises(ValueError, match="the canvas is L"):
        cut(Image.new("L", (64, 64)), plan)
    with pytest.raises(ValueError, match="the drawn picture is"):
        stitch(Image.new("RGB", (64, 64)), Image.new("RGB", (32, 32)), plan)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_known_has_nothing_of_what_is_beside_it(seed: int) -> None:
    """Whatever stands in new area, drawn whole, scaled or cropped: the known tokens are the same."""
    rng = np.random.default_rng(seed)
    margins = [int(value) for value in rng.integers(0, 90, 4)]
    margins[seed % 4] += 1
    old = noise(int(rng.integers(100, 300)), int(rng.integers(100, 300)), seed=seed)
    new, mask, known = expand_canvas(old, expand=margins)
    pixels = (40_000, 90_000, 10**6)[seed % 3]
    plan = plan_canvas(new.size, mask, max_pixels=pixels, sizes=SIZES if seed % 2 else (), mask_blur=8)
    box = known_box(plan, known)
    assert box is not None
    assert all(side % 16 == 0 for side in box)
    other = Image.new("RGB", new.size, (255, 0, 255))
    other.paste(old, known[:2])
    assert cut(new, plan)[0].crop(box).tobytes() == cut(other, plan)[0].crop(box).tobytes()
    if plan.drawn_size == plan.box_size:  # and no whole token of it is missing
        left, top = (max(a, b) - b for a, b in zip(known[:2], plan.box[:2], strict=True))
        assert max(box[0] - left, box[1] - top) < 16
        right, bottom = (min(a, b) - c for a, b, c in zip(known[2:], plan.box[2:], plan.box[:2], strict=True))
        assert max(right - box[2], bottom - box[3]) < 16


def test_too_little_that_is_known_is_nothing() -> None:
    new, mask, known = expand_canvas(noise(70, 20), expand=(0, 7, 0, 100), overlap=4)
    plan = plan_canvas(new.size, mask, max_pixels=10**6, mask_blur=8)
    assert known_box(plan, known) is None
