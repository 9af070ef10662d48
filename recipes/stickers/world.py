"""The world of the bundled model: colour stickers on procedural scenes, as a scene graph that renders to pixels.

Owns the sticker names, the scenes, the `Picture` value and its rendering. Knows nothing of prompts, tasks or models.
Everything is snapped to the grid of the latent tokens, so that moving a sticker moves whole tokens.
"""

from __future__ import annotations

import colorsys
import functools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

Colour = tuple[int, int, int]
TOKEN = 16
"""Pixels of a latent token along each side (8x autoencoder, 2x2 patches)."""
ZOOM = int(os.environ.get("ZOOM", "1"))
"""1: pictures of 128x128 pixels; 2: the same ones of 256x256. All parts of a model are made with the same."""
if ZOOM not in (1, 2):
    raise ValueError(f"ZOOM is {ZOOM}, not 1 or 2")
GRID = TOKEN * ZOOM
"""Everything stands on a grid of so many pixels."""
SIZES = tuple((width * GRID, height * GRID) for width, height in ((8, 8), (10, 6), (6, 10)))
SMALL, MEDIUM, LARGE = 2 * GRID, 3 * GRID, 4 * GRID
SCALES = (SMALL, MEDIUM, LARGE)
COLUMNS = ("left", "center", "right")
ROWS = ("top", "middle", "bottom")

STICKERS = {
    "cat": 0x1F431,
    "dog": 0x1F436,
    "fox": 0x1F98A,
    "lion": 0x1F981,
    "tiger": 0x1F42F,
    "pig": 0x1F437,
    "frog": 0x1F438,
    "monkey": 0x1F435,
    "panda": 0x1F43C,
    "koala": 0x1F428,
    "rabbit": 0x1F430,
    "mouse": 0x1F42D,
    "cow": 0x1F42E,
    "unicorn": 0x1F984,
    "chick": 0x1F424,
    "penguin": 0x1F427,
    "owl": 0x1F989,
    "whale": 0x1F433,
    "octopus": 0x1F419,
    "turtle": 0x1F422,
    "snail": 0x1F40C,
    "butterfly": 0x1F98B,
    "bee": 0x1F41D,
    "ladybug": 0x1F41E,
    "crab": 0x1F980,
    "elephant": 0x1F418,
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "cherries": 0x1F352,
    "grapes": 0x1F347,
    "watermelon": 0x1F349,
    "strawberry": 0x1F353,
    "lemon": 0x1F34B,
    "pineapple": 0x1F34D,
    "avocado": 0x1F951,
    "carrot": 0x1F955,
    "corn": 0x1F33D,
    "mushroom": 0x1F344,
    "pizza": 0x1F355,
    "burger": 0x1F354,
    "donut": 0x1F369,
    "cake": 0x1F382,
    "cupcake": 0x1F9C1,
    "cookie": 0x1F36A,
    "cactus": 0x1F335,
    "tree": 0x1F333,
    "palm tree": 0x1F334,
    "rose": 0x1F339,
    "sunflower": 0x1F33B,
    "tulip": 0x1F337,
    "football": 0x26BD,
    "basketball": 0x1F3C0,
    "guitar": 0x1F3B8,
    "drum": 0x1F941,
    "car": 0x1F697,
    "bus": 0x1F68C,
    "taxi": 0x1F695,
    "tractor": 0x1F69C,
    "bicycle": 0x1F6B2,
    "rocket": 0x1F680,
    "boat": 0x26F5,
    "balloon": 0x1F388,
    "gift": 0x1F381,
    "crown": 0x1F451,
    "umbrella": 0x2602,
    "hat": 0x1F3A9,
    "key": 0x1F511,
    "bell": 0x1F514,
    "book": 0x1F4D5,
    "clock": 0x23F0,
    "robot": 0x1F916,
    "ghost": 0x1F47B,
    "alien": 0x1F47D,
    "snowman": 0x26C4,
    "pumpkin": 0x1F383,
    "teddy": 0x1F9F8,
}

HELD_OUT = {
    "bear": 0x1F43B,
    "wolf": 0x1F43A,
    "duck": 0x1F986,
    "dolphin": 0x1F42C,
    "spider": 0x1F577,
    "pear": 0x1F350,
    "tomato": 0x1F345,
    "broccoli": 0x1F966,
    "ice cream": 0x1F368,
    "hibiscus": 0x1F33A,
    "tennis ball": 0x1F3BE,
    "trumpet": 0x1F3BA,
    "airplane": 0x1F6E9,
    "fire engine": 0x1F692,
    "lamp": 0x1F4A1,
    "gem": 0x1F48E,
}
"""Stickers that no training picture shows, of the autoencoder or of the transformer: only a reference can bring them."""

LOOKALIKES = frozenset({0x1F425, 0x1F423, 0x1F429, 0x1F366, 0x1F367, 0x1F3B7, 0x2708, 0x1F6EB, 0x1F6EC})
"""Glyphs close to a held-out one: they are left out of the unnamed training stickers too."""

PLAIN = {
    "red": (214, 64, 60),
    "orange": (240, 150, 60),
    "yellow": (246, 216, 88),
    "green": (92, 176, 92),
    "blue": (74, 128, 210),
    "purple": (140, 92, 190),
    "pink": (242, 160, 190),
    "white": (246, 246, 244),
    "grey": (150, 152, 156),
    "black": (34, 34, 38),
}
PLACES = ("beach", "night sky", "meadow", "snow", "room", "city", "desert", "forest", "sea", "sunset")
GRADIENTS = (("red", "yellow"), ("blue", "white"), ("purple", "pink"), ("green", "blue"), ("orange", "purple"))


def scene_names() -> list[str]:
    """Every scene: places, plain colours ("red") and gradients ("red to yellow")."""
    return [*PLACES, *PLAIN, *(f"{a} to {b}" for a, b in GRADIENTS)]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene. Variant 0 is the named one; the others differ in ways that only a picture can show."""

    name: str
    variant: int = 0


@dataclass(frozen=True, kw_only=True)
class Sticker:
    """A glyph at a cell of the 3x3 layout; `scale` is its side in pixels."""

    glyph: int
    scale: int = MEDIUM
    column: str = "center"
    row: str = "middle"
    mirrored: bool = False
    grey: bool = False

    def box(self, size: tuple[int, int]) -> tuple[int, int]:
        """Top left corner in pixels, a multiple of the grid."""
        free = (size[0] - self.scale, size[1] - self.scale)
        steps = (COLUMNS.index(self.column), ROWS.index(self.row))
        return (free[0] * steps[0] // 2 // GRID * GRID, free[1] * steps[1] // 2 // GRID * GRID)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a picture shows; equal pictures render to equal pixels."""

    scene: Scene
    stickers: tuple[Sticker, ...] = ()
    size: tuple[int, int] = SIZES[0]

    def with_sticker(self, index: int, **changes: object) -> Picture:
        stickers = list(self.stickers)
        stickers[index] = replace(stickers[index], **changes)  # type: ignore[arg-type]
        return replace(self, stickers=tuple(stickers))


class Renderer:
    """Renders pictures with the glyphs of one colour font (bitmaps of 109 pixels per em)."""

    def __init__(self, font: Path) -> None:
        self._font = ImageFont.truetype(str(font), 109)
        self._glyph = functools.cache(self._draw_glyph)
        self._scene = functools.cache(draw_scene)
        self._bitmap = functools.cache(self._draw_bitmap)

    def render(self, picture: Picture) -> Image.Image:
        image = self._scene(picture.scene, picture.size).copy()
        for sticker in picture.stickers:
            glyph = self.sticker(sticker)
            image.paste(glyph, sticker.box(picture.size), glyph)
        return image

    def sticker(self, sticker: Sticker) -> Image.Image:
        """The RGBA bitmap of a sticker, `scale` pixels square."""
        return self._bitmap(sticker.glyph, sticker.scale, sticker.mirrored, sticker.grey)

    def _draw_bitmap(self, codepoint: int, scale: int, mirrored: bool, grey: bool) -> Image.Image:
        glyph = self._glyph(codepoint).resize((scale, scale), Image.Resampling.LANCZOS)
        if mirrored:
            glyph = ImageOps.mirror(glyph)
        if grey:
            glyph = Image.merge("RGBA", (*[ImageOps.grayscale(glyph.convert("RGB"))] * 3, glyph.getchannel("A")))
        return glyph

    def _draw_glyph(self, codepoint: int) -> Image.Image:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((8, 8), chr(codepoint), font=self._font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"glyph U+{codepoint:X} is not in the font")
        glyph = canvas.crop(box)
        side = max(glyph.size) + 8
        square = Image.new("RGBA", (side, side))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        return square

    def unnamed_glyphs(self) -> list[int]:
        """Single code point glyphs without a name in this world: they teach copying and are never drawn by name."""
        missing = self._raw(0x1F8FF)
        named = set(STICKERS.values()) | set(HELD_OUT.values()) | LOOKALIKES
        found = []
        blocks = (*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F700), *range(0x1F900, 0x1FAFF), *range(0x2600, 0x27C0))
        for codepoint in blocks:
            if codepoint in named or 0x1F3FB <= codepoint <= 0x1F3FF:
                continue
            raw = self._raw(codepoint)
            if raw is None or raw == missing:
                continue
            found.append(codepoint)
        return found

    def _raw(self, codepoint: int) -> bytes | None:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((8, 8), chr(codepoint), font=self._font, embedded_color=True)
        return None if canvas.getbbox() is None else canvas.tobytes()


def _vertical(size: tuple[int, int], stops: list[tuple[float, tuple[int, int, int]]]) -> Image.Image:
    """A vertical gradient through (position in [0, 1], colour) stops."""
    width, height = size
    y = (np.arange(height) + 0.5) / height
    where = [position for position, _ in stops]
    channels = [np.interp(y, where, [colour[c] for _, colour in stops]) for c in range(3)]
    column = np.stack(channels, -1).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(column[:, None], (height, width, 3)).copy())


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    return Image.merge("HSV", (h.point(lambda x: int(x + 255 * turn) % 256), s, v)).convert("RGB")


class Pen:
    """Draw on an image whose pixels are `ZOOM` to a unit, along each side."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def ellipse(self, box: Sequence[float], *, fill: Colour) -> None:
        self._draw.ellipse(_zoomed(box), fill=fill)

    def rectangle(self, box: Sequence[float], *, fill: Colour, outline: Colour | None = None, width: int = 1) -> None:
        self._draw.rectangle(_zoomed(box), fill=fill, outline=outline, width=width * ZOOM)

    def polygon(self, corners: Sequence[float], *, fill: Colour) -> None:
        self._draw.polygon(_zoomed(corners), fill=fill)

    def line(self, ends: Sequence[float], *, fill: Colour, width: int) -> None:
        self._draw.line(_zoomed(ends), fill=fill, width=width * ZOOM)


def _zoomed(lengths: Sequence[float]) -> tuple[float, ...]:
    return tuple(length * ZOOM for length in lengths)


def draw_scene(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """Render one scene at twice the size, then shrink it. Lengths here are in halves of a pixel of 128x128 pictures."""
    rng = random.Random(f"{scene.name}/{scene.variant}")
    jitter = 0.0 if scene.variant == 0 else 1.0

    def vary(amount: float) -> float:
        return jitter * rng.uniform(-amount, amount)

    width, height = size[0] * 2 // ZOOM, size[1] * 2 // ZOOM
    big = (size[0] * 2, size[1] * 2)
    name = scene.name
    if name in PLAIN:
        r, g, b = (c / 255 for c in PLAIN[name])
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        rgb = colorsys.hsv_to_rgb((h + vary(0.03)) % 1, min(1, max(0, s + vary(0.12))), min(1, max(0, v + vary(0.12))))
        return Image.new("RGB", size, tuple(round(c * 255) for c in rgb))
    if " to " in name:
        a, b = (PLAIN[part] for part in name.split(" to "))
        return _vertical(size, [(0.1 + vary(0.1), a), (0.9 + vary(0.1), b)])

    horizon = round(height * (0.55 + vary(0.1)))
    sun_x, sun_y = width * (0.8 + vary(0.15)), height * (0.17 + vary(0.06))
    if name == "beach":
        image = _vertical(big, [(0, (110, 190, 240)), (horizon / height, (190, 228, 248))])
        draw = Pen(image)
        draw.ellipse((sun_x - 24, sun_y - 24, sun_x + 24, sun_y + 24), fill=(255, 226, 110))
        draw.rectangle((0, horizon, width, height), fill=(54, 148, 190))
        shore = horizon + round(height * (0.14 + vary(0.04)))
        draw.rectangle((0, shore, width, height), fill=(238, 214, 160))
        draw.rectangle((0, shore, width, shore + 6), fill=(250, 240, 214))
    elif name == "sea":
        image = _vertical(
            big, [(0, (150, 200, 236)), (0.35, (206, 230, 244)), (0.36, (40, 110, 170)), (1, (16, 58, 112))]
        )
        draw = Pen(image)
        for i in range(4):
            y = height * (0.48 + 0.13 * i) + vary(8)
            draw.line((0, y, width, y), fill=(70, 140, 196), width=5)
    elif name == "night sky":
        image = _vertical(big, [(0, (10, 14, 44)), (1, (44, 48, 104))])
        draw = Pen(image)
        for i in range(14):
            x, y = width * ((i * 0.7549 + 0.07 + vary(0.02)) % 1), height * ((i * 0.5698 + 0.1 + vary(0.02)) % 1)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(250, 246, 210))
        draw.ellipse((sun_x - 26, sun_y - 26, sun_x + 26, sun_y + 26), fill=(244, 238, 200))
    elif name == "meadow":
        image = _vertical(big, [(0, (124, 196, 240)), (1, (214, 236, 250))])
        draw = Pen(image)
        cx = width * (0.25 + vary(0.2))
        draw.ellipse((cx - 34, sun_y - 14, cx + 34, sun_y + 14), fill=(250, 252, 254))
        draw.ellipse((-width * 0.4, horizon - 10, width * 0.9, height * 1.9), fill=(112, 190, 88))
        draw.ellipse((width * 0.3, horizon, width * 1.5, height * 2), fill=(88, 168, 72))
    elif name == "snow":
        image = _vertical(big, [(0, (168, 190, 214)), (1, (222, 232, 242))])
        draw = Pen(image)
        draw.polygon(
            (width * (0.1 + vary(0.1)), horizon, width * 0.38, height * (0.2 + vary(0.05)), width * 0.7, horizon),
            fill=(132, 150, 178),
        )
        draw.ellipse((-width * 0.3, horizon - 8, width * 1.3, height * 2), fill=(246, 249, 252))
    elif name == "room":
        warm = round(vary(24))
        image = Image.new("RGB", big, (226, 206 + warm // 2, 180 - warm))
        draw = Pen(image)
        floor = round(height * (0.72 + vary(0.06)))
        draw.rectangle((0, floor, width, height), fill=(150, 104, 70))
        draw.rectangle((0, floor, width, floor + 8), fill=(244, 236, 224))
        x, y = width * (0.12 + vary(0.06)), height * 0.12
        draw.rectangle(
            (x, y, x + width * 0.28, y + height * 0.34), fill=(170, 214, 240), outline=(250, 250, 250), width=8
        )
    elif name == "city":
        image = _vertical(big, [(0, (250, 190, 140)), (0.7, (250, 224, 190)), (1, (250, 224, 190))])
        draw = Pen(image)
        street = round(height * 0.86)
        for i in range(6):
            x = width * i / 6
            top = height * (0.3 + 0.2 * ((i * 0.618 + 0.3) % 1)) + vary(22)
            tone = 70 + 18 * (i % 3)
            draw.rectangle((x, top, x + width / 6 - 4, street), fill=(tone, tone + 8, tone + 28))
        draw.rectangle((0, street, width, height), fill=(92, 92, 98))
    elif name == "desert":
        image = _vertical(big, [(0, (246, 206, 140)), (1, (252, 236, 196))])
        draw = Pen(image)
        draw.ellipse((sun_x - 26, sun_y - 26, sun_x + 26, sun_y + 26), fill=(255, 250, 226))
        draw.ellipse((-width * 0.5, horizon - 4, width * 0.8, height * 2), fill=(224, 164, 96))
        draw.ellipse((width * 0.2, horizon + 14, width * 1.6, height * 2), fill=(206, 140, 76))
    elif name == "forest":
        image = _vertical(big, [(0, (166, 206, 190)), (1, (120, 168, 140))])
        draw = Pen(image)
        ground = round(height * (0.78 + vary(0.05)))
        for i in range(6):
            x = width * (i + 0.5) / 6 + vary(8)
            draw.polygon(
                (x - 34, ground, x, ground - height * 0.5, x + 34, ground),
                fill=(34 + 12 * (i % 2), 96 + 14 * (i % 3), 66),
            )
        draw.rectangle((0, ground, width, height), fill=(84, 112, 62))
    elif name == "sunset":
        image = _vertical(big, [(0, (88, 60, 120)), (0.35, (226, 104, 96)), (horizon / height, (252, 190, 110))])
        draw = Pen(image)
        cx = width * (0.5 + vary(0.25))
        draw.ellipse((cx - 34, horizon - 34, cx + 34, horizon + 34), fill=(255, 232, 150))
        draw.rectangle((0, horizon, width, height), fill=(70, 50, 84))
    else:
        raise ValueError(f"scene {name!r} is not one of {', '.join(scene_names())}")
    if scene.variant:
        image = _shift_hue(image, vary(0.04))
    return image.filter(ImageFilter.GaussianBlur(1)).resize(size, Image.Resampling.LANCZOS)
