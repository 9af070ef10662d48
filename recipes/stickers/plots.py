"""Draw the curves of a run from the logs of the training scripts: OUT/autoencoder.png and OUT/transformer.png."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; for a step that ran twice (stopped, resumed) the later one."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "step" in row:
            rows[row["step"], "score" in row] = row
    return [rows[key] for key in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, help="log.jsonl of train_autoencoder.py")
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        default=[],
        help="log.jsonl of train.py; of several runs, each from the last one's weights",
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.vae:
        rows = read(args.vae)
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        axes.plot([r["step"] for r in rows], [r["mse"] for r in rows])
        axes.set(xlabel="step", ylabel="squared error, [-1, 1]", yscale="log", title="autoencoder")
        figure.savefig(args.out / "autoencoder.png", dpi=90)
    if args.model:
        rows, starts = [], [0]
        for path in args.model:
            some = [row | {"step": starts[-1] + row["step"]} for row in read(path)]
            rows += some
            starts.append(some[-1]["step"])
        scored = [r for r in rows if "score" in r]
        tasks = [name[5:] for name in (scored[0] if scored else {}) if re.match("psnr_(?!small_)", name)]
        strayed = [task for task in tasks if f"strayed_{task}" in scored[0]]
        figure, (left, right, *third) = plt.subplots(
            1, 3 if strayed else 2, figsize=(16 if strayed else 11, 4), layout="constrained"
        )
        for count in range(5):
            name = f"loss_{count}_references"
            some = [r for r in rows if name in r]
            left.plot([r["step"] for r in some], [r[name] for r in some], label=f"{count} references")
        for start in starts[1:-1]:
            for axes in (left, right, *third):
                axes.axvline(start, color="tab:gray", linestyle=":")
        left.set(xlabel="step", ylabel="weighted error of the velocity", yscale="log", title="training")
        left.legend()
        for task in tasks:
            right.plot([r["step"] for r in scored], [r[f"psnr_{task}"] for r in scored], marker=".", label=task)
        right.set(xlabel="step", ylabel="PSNR of 4 steps, dB", title="prompts and pictures not trained on")
        right.legend()
        for axes in third:
            for task in strayed:
                share = [r[f"strayed_{task}"] * 100 for r in scored]
                axes.plot([r["step"] for r in scored], share, marker=".", label=task)
            axes.set(xlabel="step", ylabel="%", title="stickers nearer to another form")
            axes.legend()
        figure.savefig(args.out / "transformer.png", dpi=90)


if __name__ == "__main__":
    main()
