"""Outpainting: where the picture stands, what is masked, and how the new area is filled."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tests.support.tiny import picture

from limner import InvalidRequest
from limner.images import expand_canvas, expanded_size


def test_the_picture_stays_and_the_rest_is_masked() -> None:
    old = picture(80, 64)
    new, mask, known = expand_canvas(old, expand=(32, 0, 16, 8), overlap=4)
    assert new.size == (128, 72) == expanded_size(old.size, expand=(32, 0, 16, 8), overlap=4)
    assert mask.shape == (72, 128)
    assert known == (32, 0, 112, 64)
    assert np.array_equal(np.asarray(new)[:64, 32:112], np.asarray(old))
    expected = np.full((72, 128), 255, np.uint8)
    expected[:60, 36:108] = 0  # nothing new at the top: no overlap there
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("anchor", "corner"),
    [("center", (24, 17)), ("left", (0, 17)), ("top", (24, 0)), ("bottom-right", (48, 35)), ("top-left", (0, 0))],
)
def test_anchors(anchor: str, corner: tuple[int, int]) -> None:
    old = picture(80, 64)
    new, *_ = expand_canvas(old, size=(128, 99), anchor=anchor)
    assert new.size == (128, 99) == expanded_size(old.size, size=(128, 99), anchor=anchor)
    x, y = corner
    assert np.array_equal(np.asarray(new)[y : y + 64, x : x + 80], np.asarray(old))


def test_the_fill_has_no_hard_edge_and_no_streaks() -> None:
    old = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    new = np.asarray(expand_canvas(old, expand=(0, 0, 64, 0))[0]).astype(int)
    assert np.abs(new[:, 64] - new[:, 63]).mean() < 12  # the edge goes on
    assert new[:, 127].std(0).max() < 0.25 * new[:, 63].std(0).min()  # and fades with the distance
    plain = np.asarray(expand_canvas(Image.new("RGB", (64, 64), (9, 99, 199)), expand=(7, 20, 0, 3))[0])
    assert (plain == (9, 99, 199)).all()


def test_alpha_is_kept() -> None:
    old = Image.new("RGBA", (64, 64), (1, 2, 3, 77))
    assert expand_canvas(old, expand=(1, 1, 1, 1))[0].getpixel((30, 30)) == (1, 2, 3, 77)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"expand: give either expand=\(left, top, right, bottom\) or a new size"),
        ({"expand": (1, 1, 1, 1), "size": (99, 99)}, "expand: give either"),
        ({"expand": (0, 0, 0, 0)}, r"expand: \(0, 0, 0, 0\) adds nothing"),
        ({"expand": (1, 1)}, r"expand: \(1, 1\) is not \(left, top, right, bottom\) in whole pixels from 0"),
        ({"expand": (1, 1, 1, -1)}, "expand: .* in whole pixels from 0"),
        ({"expand": (1.5, 1, 1, 1)}, "expand: .* in whole pixels from 0"),
        (
            {"expand": (70_000, 0, 0, 70_000)},
            "expand: the new picture would be 70064x70064, over 64000000 pixels; add less",
        ),
        ({"size": (64, 32)}, "size: 64x32 is not larger than the picture, 64x64; give a larger size, or scale"),
        ({"size": (64, 64)}, "size: 64x64 is not larger"),
        ({"size": (99, 99), "anchor": "middle"}, "anchor: 'middle' is not one of center, left"),
        ({"expand": (9, 0, 9, 0), "overlap": 32}, "overlap: 32 leaves nothing of the picture, 64x64; use at most 31"),
        ({"expand": (9, 0, 9, 0), "overlap": -1}, "overlap: -1 is not a whole number of pixels from 0; use 16"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        expand_canvas(picture(64, 64), **options)
