"""How much of a reference is copied, by its weight: draws curves/weights.png, and writes the numbers beside it.

Cases put a sticker of image 2 into image 1; no training picture shows these stickers, so only the reference can bring them.
What is copied is measured along the way from the picture without the sticker (0) to that with it (1), on the pixels where the
two differ. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from common import find_font
from evaluate import cases
from judge import pixels
from limner import Pipeline
from tasks import Example
from world import Renderer

WEIGHTS = tuple(i / 8 for i in range(13))


def added(case: Example) -> bool:
    """Return True if a case leaves image 1 as it is, but for a sticker of image 2."""
    first = case.references[0]
    return (
        len(case.references) == 2 and case.result.scene == first.scene and case.result.stickers[:-1] == first.stickers
    )


def copied(image: Image.Image, case: Example, renderer: Renderer) -> float:
    """Return the share of the sticker that is there: 0 in the picture without it, 1 in the truth."""
    truth = pixels(renderer.render(case.result))
    way = truth - pixels(renderer.render(replace(case.result, stickers=case.result.stickers[:-1])))
    return 1 - float(((truth - pixels(image)) * way).sum() / np.square(way).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: the bundled model")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--font", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves" / "weights.png")
    args = parser.parse_args()
    renderer, pipe = Renderer(find_font(args.font)), Pipeline.from_pretrained(args.model)
    chosen = [case for case in cases("held_out", 10 * args.cases) if added(case)][: args.cases]
    shares = np.zeros((len(chosen), len(WEIGHTS)))
    for number, case in enumerate(chosen):
        references = [renderer.render(p) for p in case.references]
        for column, weight in enumerate(WEIGHTS):
            out = pipe(
                case.prompt,
                image=references,
                reference_weights=[1.0, weight],
                width=case.result.size[0],
                height=case.result.size[1],
                generator=torch.Generator().manual_seed(number),
            )
            shares[number, column] = copied(out.images[0], case, renderer)
        print(number, case.prompt, np.round(shares[number], 2).tolist(), flush=True)
    mean = shares.mean(0)
    low, high = np.quantile(shares, (0.25, 0.75), axis=0)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.fill_between(WEIGHTS, low, high, alpha=0.2, label="half of the cases")
    axes.plot(WEIGHTS, mean, marker="o", label="mean")
    axes.set(xlabel="weight of reference 2", ylabel="share of its sticker that is copied")
    axes.set_title(f"{len(chosen)} stickers that training never saw")
    axes.legend(loc="lower right")
    figure.savefig(args.out, dpi=90)
    found = {
        "cases": len(chosen),
        "weights": WEIGHTS,
        "copied": [round(float(value), 4) for value in mean],
        "monotone": all(b >= a for a, b in pairwise(mean)),
    }
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
