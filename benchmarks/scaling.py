"""Seconds of a 4-step edit against the number of references, the side of the output and the number of images, plotted.

Each measured line of Limner is plotted with the model: floating point operations over the rate of a plain product of the
same dtype on the same machine. One run, all engines in turn, medians. The last line is one JSON object.

    .venv/bin/python benchmarks/scaling.py -o benchmarks/results/scaling
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import torch

from limner.bench import Bench, BenchCase, geometry, machine, prefill_flops, step_flops
from limner.config import TransformerConfig

ENGINES = ("diffusers_kv", "cold", "warm", "int8_warm")
NAMES = {
    "diffusers_kv": "diffusers with its K/V cache",
    "cold": "Limner, references new",
    "warm": "Limner, references kept",
    "int8_warm": "Limner int8, references kept",
}


def model_teraflop(config: TransformerConfig, case: BenchCase, engine: str) -> float:
    """Return the operations that a case needs, in 10^12."""
    num_ref = sum(h * w for h, w in case.reference_grids)
    num_own = case.num_text + case.grid[0] * case.grid[1]
    steps = (
        step_flops(config, num_own=num_own, num_ref=num_ref, num_txt=case.num_text)
        * case.num_inference_steps
        * case.batch
    )
    return (steps + (prefill_flops(config, num_ref=num_ref) if engine == "cold" else 0)) / 1e12


def panel(axes: Any, title: str, values: list[int], rows: list[dict[str, Any]]) -> None:
    for engine, color in zip(ENGINES, ("tab:gray", "tab:orange", "tab:blue", "tab:green"), strict=True):
        known = [(v, row["seconds"][engine]) for v, row in zip(values, rows, strict=True) if engine in row["seconds"]]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", color=color, label=NAMES[engine])
        if engine in ("cold", "warm"):
            model = [row["model_seconds"][engine] for row in rows]
            axes.plot(values, model, linestyle="--", color=color, label=f"{NAMES[engine]}: operations / rate")
    axes.set(xlabel=title, ylabel="seconds", ylim=(0, None), xticks=values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--side", type=int, default=512, help="of references, and of the output where it does not vary")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--geometry", type=int, nargs=3, default=[8, 2, 6], help="heads of 128, double, single blocks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True, help="without suffix: .json and .png are made")
    args = parser.parse_args()
    config = geometry(*args.geometry)
    bench = Bench(config, dtype=torch.bfloat16, device=args.device)
    common = {"reference_side": args.side, "num_text": args.text}
    sweeps = {
        "references": [BenchCase(num_references=n, side=args.side, **common) for n in args.references],
        "side of the output": [BenchCase(num_references=2, side=side, **common) for side in args.sides],
        "images": [BenchCase(num_references=2, side=args.side, batch=n, **common) for n in args.batches],
    }
    report: dict[str, Any] = {"benchmark": "scaling", **machine(bench.device), "command": shlex.join(sys.argv)}
    report["geometry"] = {"hidden": config.width, "double": args.geometry[1], "single": args.geometry[2]}
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axes, (title, cases) in zip(panels, sweeps.items(), strict=True):
        rows = []
        for case in cases:
            row = bench.run(
                case,
                rounds=args.rounds,
                engines=ENGINES,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
            rate = row["plain_product_gflops"] / 1e3
            row["model_seconds"] = {
                engine: round(model_teraflop(config, case, engine) / rate, 3) for engine in ("cold", "warm")
            }
            rows.append(row)
        report[title] = rows
        panel(axes, title, {"references": args.references, "images": args.batches}.get(title, args.sides), rows)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"4-step edit, hidden {config.width}, {report['device']}, {report['date']}")
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    figure.savefig(args.output.with_suffix(".png"), dpi=90)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
