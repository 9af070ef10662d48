"""Makes docs/strip.png with the bundled model: references, prompt, result; a row an edit."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from limner import Pipeline

SAMPLES = Path(__file__).parent.parent / "src" / "limner" / "assets" / "samples"
ROWS = [
    ("use the background of image 2", ["cat", "beach"]),
    ("put the sticker in the snow", ["duck"]),
    ("put the dog at sunset", ["dog"]),
    ("the rocket over a gradient from purple to pink", ["rocket"]),
]
SIDE, GAP, TEXT = 128, 12, 300


def main() -> None:
    pipe = Pipeline.from_pretrained()
    strip = Image.new("RGB", (3 * (SIDE + GAP) + TEXT, len(ROWS) * (SIDE + GAP) + GAP), "white")
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
        draw.multiline_text((GAP + 2 * (SIDE + GAP) + GAP, y + 30), "\n".join(lines), fill="black", font=font)
        strip.paste(out.images[0], (2 * (SIDE + GAP) + TEXT, y))
    strip.save(Path(__file__).parent / "strip.png", optimize=True)


if __name__ == "__main__":
    main()
