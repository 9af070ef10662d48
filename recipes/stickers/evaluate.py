"""Evaluates a model on prompts that training never saw, against the rendered truth.

The last line is one JSON object: PSNR in dB by task over `--cases` cases each, of the model and of the baseline that
copies reference 1 (for `draw`: a grey picture). `held_out` are edits of stickers that no training picture shows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import find_font
from limner import Pipeline
from tasks import Example, Grammar
from world import HELD_OUT, STICKERS, Renderer

TASKS = ("draw", "edit", "combine2", "combine3", "combine4", "held_out")


def cases(task: str, num: int, *, seed: int = 0) -> list[Example]:
    """Fixed cases of a task."""
    rng = random.Random(f"{seed}/{task}/evaluation")
    if task == "held_out":
        grammar = Grammar([*HELD_OUT.values()], evaluation=True)
        return [grammar.draw(rng, rng.choice(("edit", "combine2"))) for _ in range(num)]
    grammar = Grammar([*STICKERS.values()], evaluation=True)
    return [grammar.draw(rng, task) for _ in range(num)]


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / 255
    return -10 * math.log10(max(float(np.square(error).mean()), 1e-10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: the bundled model")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--font", type=Path)
    parser.add_argument("--sheet", type=Path, help="write a picture of the first cases: references, result, truth")
    parser.add_argument(
        "--save-cases", type=Path, help="write the first four cases of each task to a folder, for tests"
    )
    args = parser.parse_args()
    renderer = Renderer(find_font(args.font))
    pipe = Pipeline.from_pretrained(args.model)
    results: dict[str, dict[str, float]] = {}
    rows: list[list[Image.Image]] = []
    saved = []
    for task in TASKS:
        scores, baseline = [], []
        for number, case in enumerate(cases(task, args.cases)):
            references = [renderer.render(p) for p in case.references]
            truth = renderer.render(case.result)
            out = pipe(
                case.prompt, image=references or None, width=truth.width, height=truth.height,
                generator=torch.Generator().manual_seed(number),
            ).images[0]  # fmt: skip
            scores.append(psnr(out, truth))
            copied = references[0].resize(truth.size) if references else Image.new("RGB", truth.size, (128, 128, 128))
            baseline.append(psnr(copied, truth))
            if number < 8:
                rows.append([*references, out, truth])
            if number < 4 and args.save_cases:
                names = [f"{task}-{number}-{i}.png" for i in range(1, len(references) + 1)] + [
                    f"{task}-{number}-truth.png"
                ]
                args.save_cases.mkdir(parents=True, exist_ok=True)
                for name, image in zip(names, [*references, truth], strict=True):
                    image.save(args.save_cases / name)
                saved.append({"task": task, "prompt": case.prompt, "references": names[:-1], "truth": names[-1]})
        results[task] = {"psnr": round(float(np.mean(scores)), 2), "copy": round(float(np.mean(baseline)), 2)}
        print(task, results[task], flush=True)
    if args.sheet:
        sheet = Image.new("RGB", (6 * 164, (len(rows) + 1) // 2 * 82), "white")
        for i, row in enumerate(rows):
            for j, image in enumerate(row):
                x = (j if j < len(row) - 2 else 6 - len(row) + j) * 82 + (i % 2) * 492
                sheet.paste(image.resize((image.width // 2, image.height // 2)), (x, i // 2 * 82))
        sheet.save(args.sheet)
    if args.save_cases:
        (args.save_cases / "cases.json").write_text(json.dumps(saved, indent=1) + "\n")
    print(json.dumps({"cases": args.cases, "tasks": results}))


if __name__ == "__main__":
    main()
