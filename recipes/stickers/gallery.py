"""Draw docs/gallery.png: the first cases of each task of the evaluation, not selected: references, prompt, result, truth."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common import find_font
from evaluate import TASKS, cases
from limner import Pipeline
from tasks import Example
from world import SIZES, Renderer

SIDE, GAP, TEXT, MOST = SIZES[0][0], 8, 220, 4
FIRST_SEED = 0


def fitted(image: Image.Image) -> Image.Image:
    """Return the picture scaled down to a cell."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    return image


def wrapped(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if draw.textlength(longer, font) < TEXT - GAP else [*lines, word]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: the bundled model")
    parser.add_argument("--rows", type=int, default=3, help="cases a task")
    parser.add_argument("--font", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "gallery.png")
    args = parser.parse_args()
    renderer, pipe = Renderer(find_font(args.font)), Pipeline.from_pretrained(args.model)
    chosen: list[tuple[str, int, Example]] = [
        (task, number, case) for task in TASKS for number, case in enumerate(cases(task, args.rows))
    ]
    head, cell = 24, SIDE + GAP
    canvas = Image.new("RGB", (MOST * cell + TEXT + 2 * cell + GAP, head + len(chosen) * cell), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    result_x = GAP + MOST * cell + TEXT
    for x, title in (
        (GAP, "references"),
        (GAP + MOST * cell, "prompt"),
        (result_x, "result"),
        (result_x + cell, "truth"),
    ):
        draw.text((x, 5), title, fill="black", font=font)
    for row, (task, number, case) in enumerate(chosen):
        y = head + row * cell
        references = [renderer.render(p) for p in case.references]
        truth = renderer.render(case.result)
        out = pipe(
            case.prompt,
            image=references or None,
            width=truth.width,
            height=truth.height,
            generator=torch.Generator().manual_seed(FIRST_SEED + number),
        )
        for i, picture in enumerate(references):
            canvas.paste(fitted(picture), (GAP + i * cell, y))
        text = f"{task}\n\n{wrapped(draw, case.prompt, font)}"
        draw.multiline_text((GAP + MOST * cell, y + 8), text, fill="black", font=font)
        canvas.paste(fitted(out.images[0]), (result_x, y))
        canvas.paste(fitted(truth), (result_x + cell, y))
    canvas.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
