"""Makes docs/strip_control.png with the bundled model: a mask, new area, weights of a reference, and preserve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont

from limner import Pipeline

SAMPLES = Path(__file__).parent.parent / "src" / "limner" / "assets" / "samples"
SIDE, GAP, HEAD, COLUMNS = 128, 12, 54, 5
TIMES = 4
"""By how much the difference in the last row is brightened."""

Cell = tuple[str, Image.Image]


def sample(name: str) -> Image.Image:
    with Image.open(SAMPLES / f"{name}.png") as image:
        return image.convert("RGB")


def marked(canvas: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a canvas with the mask in white over it."""
    return Image.composite(Image.blend(canvas, Image.new("RGB", canvas.size, "white"), 0.7), canvas, mask)


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    values = np.asarray(ImageChops.difference(a, b)).astype(int) * TIMES
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def rows(pipe: Pipeline) -> list[list[Cell]]:
    def draw(prompt: str, **how: Any) -> Image.Image:
        return pipe(prompt, generator=torch.Generator().manual_seed(1), **how).images[0]

    beach, cat, dog = sample("beach"), sample("cat"), sample("dog")
    mask = Image.new("L", beach.size)
    mask.paste(255, (0, 32, 64, 96))
    put = "put the cat from image 2 into image 1 on the left"
    masked = draw(put, image=[beach, cat], mask_image=mask)
    meadow, alone = sample("meadow"), "only the background, without the sticker"
    wide = draw(alone, image=[meadow], expand=(0, 0, 32, 0))
    weights = [
        (f"weight {weight:g}", draw(put, image=[beach, cat], reference_weights=[1.0, weight]))
        for weight in (0, 0.25, 0.5, 1)
    ]
    plain = draw("mirror the dog", image=[dog])
    kept = draw("mirror the dog", image=[dog], preserve="auto")
    return [
        [
            ("canvas and mask", marked(beach, mask)),
            ("image 2", cat),
            (put, masked),
            ("what changed", difference(masked, beach)),
        ],
        [("image 1", meadow), (f"{alone}, 32 pixels more", wide)],
        [("image 2", cat), *weights],
        [
            ("image 1", dog),
            ("mirror the dog", plain),
            ("what changed", difference(plain, dog)),
            ('preserve="auto"', kept),
            ("what changed", difference(kept, dog)),
        ],
    ]


def main() -> None:
    found = rows(Pipeline.from_pretrained())
    cell = SIDE + GAP
    strip = Image.new("RGB", (COLUMNS * cell + GAP, len(found) * (cell + HEAD)), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    for row, cells in enumerate(found):
        y = row * (cell + HEAD)
        for column, (text, picture) in enumerate(cells):
            x = GAP + column * cell
            words, lines = text.split(), [""]
            for word in words:
                longer = f"{lines[-1]} {word}".strip()
                lines = [*lines[:-1], longer] if draw.textlength(longer, font) <= SIDE + GAP // 2 else [*lines, word]
            draw.multiline_text((x, y + 4), "\n".join(lines), fill="black", font=font, spacing=2)
            strip.paste(picture, (x, y + HEAD))
    strip.save(Path(__file__).parent / "strip_control.png", optimize=True)


if __name__ == "__main__":
    main()
