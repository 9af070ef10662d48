"""Relative error of one velocity when weights and activations are int8, at the widths of the family, random weights.

The reference is the same bfloat16 weights with float32 products. The last line is one JSON object.

    .venv/bin/python benchmarks/int8_error.py --geometry 24 5 20
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from limner.bench import geometry, machine, random_transformer
from limner.model.int8 import quantize_blocks
from limner.model.kv import LayerKV, ReferenceKV, quantize_layer
from limner.tokens import image_ids, reference_ids, text_ids


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--geometry", type=int, nargs=3, default=[24, 5, 20], help="heads of 128, double, single blocks"
    )
    parser.add_argument("--side", type=int, default=256, help="of output and reference, in pixels")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--sigma", type=float, default=0.9, help="noise level")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    config = geometry(*args.geometry)
    model = random_transformer(config)
    grid = (args.side // 16, args.side // 16)
    noise, ref = (torch.randn(1, grid[0] * grid[1], config.in_channels).bfloat16() for _ in range(2))
    txt = torch.randn(1, args.text, config.text_width).bfloat16()

    def velocity(kept: ReferenceKV) -> torch.Tensor:
        ids = {"img_ids": image_ids(grid), "txt_ids": text_ids(args.text)}
        return model(noise, txt, args.sigma, references=kept, **ids).float()

    def error(found: torch.Tensor) -> float:
        return round(((found - right).norm() / right.norm()).item(), 5)

    model.use_arithmetic(torch.float32)
    kept = model.prefill(ref, reference_ids([grid]))
    right = velocity(kept)
    errors = {"bfloat16 products": 0.0}
    model.use_arithmetic(torch.bfloat16)
    errors["bfloat16 products"] = error(velocity(model.prefill(ref, reference_ids([grid]))))
    model.use_arithmetic(torch.float32)
    for kind in ("int8", "fp8"):
        narrow = tuple(quantize_layer(x, kind) for x in kept.layers if isinstance(x, LayerKV))
        errors[f"{kind} K/V"] = error(velocity(ReferenceKV(layers=narrow)))
    quantize_blocks(model)
    errors["int8 weights and activations"] = error(velocity(model.prefill(ref, reference_ids([grid]))))
    result = {"benchmark": "int8_error", **machine(torch.device("cpu")), "errors": errors}
    result["geometry"] = {"hidden": config.width, "double": args.geometry[1], "single": args.geometry[2]}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
