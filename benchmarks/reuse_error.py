"""How far `reuse="step0"` is from exact joint references, beside what isolated references would give, on random weights.

Weights are drawn so that every part counts (each matrix keeps the size of its input; modulations 1.5 times). Random weights
say nothing of trained ones: no trained standard klein can be had where this runs.

    .venv/bin/python benchmarks/reuse_error.py -o benchmarks/results/reuse_error.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from limner.bench import geometry, machine, random_transformer
from limner.model.kv import LayerKV, ReferenceKV
from limner.model.transformer import Transformer
from limner.schedule import Schedule, euler_step
from limner.tokens import image_ids, reference_ids, text_ids

GRID, REFERENCES, TEXT, STEPS = (16, 16), [(16, 16)] * 2, 64, 4


def model(seed: int) -> Transformer:
    made = random_transformer(geometry(4, 2, 4), seed=seed).float()
    for name, weight in made.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=(1.5 if "modulation" in name else 1.0) * weight.shape[1] ** -0.5)
    return made


def draw(made: Transformer, seed: int, how: str) -> Tensor:
    """The latents after all steps; `how` is exact, reuse or isolated."""
    generator = torch.Generator().manual_seed(seed)
    latents, txt, ref = (
        torch.randn(1, num, width, generator=generator)
        for num, width in (
            (GRID[0] * GRID[1], made.config.in_channels),
            (TEXT, made.config.text_width),
            (sum(h * w for h, w in REFERENCES), made.config.in_channels),
        )
    )
    ids = {"img_ids": image_ids(GRID), "txt_ids": text_ids(TEXT)}
    ref_ids = reference_ids(REFERENCES)
    kept: ReferenceKV | None = made.prefill(ref, ref_ids) if how == "isolated" else None
    sigmas = Schedule().sigmas(GRID[0] * GRID[1], num_inference_steps=STEPS)
    for i in range(STEPS):
        found: list[LayerKV] = []
        joint = {} if kept is not None else {"ref_tokens": ref, "ref_ids": ref_ids}
        keep = found.append if how == "reuse" and kept is None else None
        velocity = made(latents, txt, sigmas[i], references=kept, kept=keep, **ids, **joint)
        kept = ReferenceKV(layers=tuple(found)) if found else kept
        latents = euler_step(latents, velocity, sigma=sigmas[i], next_sigma=sigmas[i + 1])
    return latents


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    errors: dict[str, list[float]] = {"reuse": [], "isolated": []}
    for seed in range(args.models):
        made = model(seed)
        exact = draw(made, seed, "exact")
        for how, found in errors.items():
            found.append(((draw(made, seed, how) - exact).norm() / exact.norm()).item())
    report = {
        "benchmark": "reuse_error",
        **machine(torch.device("cpu")),
        "relative_error_of_latents": {how: round(statistics.median(found), 4) for how, found in errors.items()},
        "all": {how: [round(x, 4) for x in found] for how, found in errors.items()},
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
