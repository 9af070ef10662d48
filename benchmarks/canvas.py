"""Peak memory and seconds of what is done with canvases besides drawing, each case in a new process. Linux only.

The picture is coarse and fine noise. What was drawn of it is moved by two pixels, tinted, and changed in a twentieth. Bytes
are the growth of the process at its peak, the most of three runs, for each pixel of the canvas; seconds are the median, for
each megapixel of it. `limner.memory.control` counts these bytes. The last line is one JSON object; `-o` merges its cases
into a file, so that `--only` may run some of them.

    .venv/bin/python benchmarks/canvas.py -o benchmarks/results/canvas.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from limner.bench import machine
from limner.bench.measure import grown
from limner.images import cut, plan_canvas, preserve, stitch

CASES = (
    ("preserve", 1024, 1024),
    ("preserve", 2048, 2048),
    ("preserve", 3072, 3072),
    ("preserve", 4096, 1024),
    ("stitch", 4096, 1024),
    ("stitch", 4096, 3000),
)
"""What is done, the side of the canvas, and that of what is drawn of it."""


def photo(side: int) -> Image.Image:
    rng = np.random.default_rng(side)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 64, side // 64, 3), dtype=np.uint8)).resize((side, side))
    fine = rng.integers(-9, 10, (side, side, 3), dtype=np.int16)
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def edited(picture: Image.Image) -> Image.Image:
    side = picture.width
    moved = picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, -2, 0, 1, 0)).point(lambda v: v * 0.98 + 2)
    moved.paste((200, 30, 30), (side // 3, side // 3, side // 3 + side // 5, side // 3 + side // 4))
    return moved


def put_back(canvas: Image.Image, drawn: Image.Image, mask: np.ndarray) -> None:
    plan = plan_canvas(canvas.size, mask, max_pixels=drawn.width * drawn.height, mask_blur=8)
    pixels, _ = cut(canvas, plan)
    weight = plan.weight()
    plan.report(weight)
    stitch(canvas, pixels, plan, weight=weight)


def measure(what: str, side: int, small: int) -> dict[str, Any]:
    """One case, in this process."""
    canvas = photo(side)
    drawn = edited(canvas if small == side else canvas.resize((small, small)))
    mask = np.zeros((canvas.height, canvas.width), np.uint8)
    mask[canvas.height // 8 : -canvas.height // 8, canvas.width // 8 : -canvas.width // 8] = 255
    seconds: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        if what == "preserve":
            preserve(canvas, drawn)
        else:
            put_back(canvas, drawn, mask)
        seconds.append(time.perf_counter() - start)

    peaks = [grown(timed) for _ in range(3)]
    pixels = side**2
    return {
        "bytes_per_pixel": round(max(peaks) / pixels, 1),
        "seconds_per_megapixel": round(statistics.median(seconds) / (pixels / 1e6), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(len(CASES))
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, default=list(numbers), help="some of the cases")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(*CASES[args.case])))
        return
    how = {**machine(torch.device("cpu")), "command": shlex.join(["benchmarks/canvas.py", *sys.argv[1:]])}
    cases: dict[str, Any] = {}
    for number in args.only:
        words = [sys.executable, __file__, "--case", str(number)]
        found = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
        what, side, small = CASES[number]
        cases[f"{what}: {side}x{side}, drawn as {small}x{small}"] = how | found
        print(found, file=sys.stderr)
    before = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    result = {"benchmark": "canvas", "cases": before.get("cases", {}) | cases}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
