"""Makes docs/strip.png with the bundled model: references, prompt, result; a row an edit."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from limner import Pipeline

SAMPLES = Path(__file__).parent.parent / "src" / "limner" / "assets" / "samples"
ROWS = [
    ("put the cat from image 2 into image 1 on the left", ["beach", "cat"]),
    ("put the sticker in the forest", ["duck"]),
    ("into image 1: the dog of image 2 bottom left, the rocket of image 3 top right", ["meadow", "dog", "rocket"]),
]
SIDE, GAP, TEXT = 128, 12, 300


def main() -> None:
    pipe = Pipeline.from_pretrained()
    strip = Image.new("RGB", (4 * (SIDE + GAP) + TEXT, len(ROWS) * (SIDE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(16)
    for row, (prompt, names) in enumerate(ROWS):
        y = GAP + row * (SIDE + GAP)
        out = pipe(
            prompt, image=[SAMPLES / f"{name}.png" for name in names], generator=torch.Generator().manual_seed(1)
        )
        for column, name in enumerate(names):
            with Image.open(SAMPLES / f"{name}.png") as sample:
                strip.paste(sample.convert("RGB"), (GAP + column * (SIDE + GAP), y))
        words, lines = prompt.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if draw.textlength(longer, font) < TEXT - 2 * GAP else [*lines, word]
        draw.multiline_text((GAP + 3 * (SIDE + GAP) + GAP, y + 30), "\n".join(lines), fill="black", font=font)
        strip.paste(out.images[0], (3 * (SIDE + GAP) + TEXT, y))
    strip.save(Path(__file__).parent / "strip.png", optimize=True)


if __name__ == "__main__":
    main()
