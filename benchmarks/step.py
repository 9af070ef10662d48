"""Seconds of a 4-step edit: diffusers without K/V cache, diffusers with it, Limner cold and warm; one run, same weights.

Transformer and Euler steps only (no text encoder, no autoencoder). Each round runs all four, in turn; medians over rounds.
"Warm" means that the references were prefilled before. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

import limner
from limner.config import TransformerConfig
from limner.model.transformer import ReferenceKV, Transformer
from limner.schedule import Schedule, euler_step
from limner.tokens import image_ids, reference_ids, text_ids


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8, help="heads of 128 (hidden 1024)")
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=6)
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--grid", type=int, default=32, help="side of output and references in tokens")
    parser.add_argument("--references", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernel", help="attention kernel of Limner")
    parser.add_argument("--out", type=Path, help="write the JSON to a file too")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = TransformerConfig(
        num_double_blocks=args.double, num_single_blocks=args.single, num_heads=args.heads, head_dim=128,
        text_width=3 * 128 * args.heads,
    )  # fmt: skip
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    theirs = Flux2Transformer2DModel(**config.to_diffusers()).to(device, dtype).eval()
    for block in theirs.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in theirs.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    with torch.device("meta"):
        ours = Transformer(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.kernel = args.kernel

    grid = (args.grid, args.grid)
    txt = torch.randn(1, args.text, config.text_width, device=device, dtype=dtype)
    noise = torch.randn(1, grid[0] * grid[1], config.in_channels, device=device, dtype=dtype)
    ref_ids, img_ids, txt_ids = reference_ids([grid] * args.references), image_ids(grid), text_ids(args.text)
    ref = torch.randn(1, len(ref_ids), config.in_channels, device=device, dtype=dtype)
    sigmas = Schedule().sigmas(noise.shape[1], num_steps=args.steps).to(device)
    both_ids = torch.cat([ref_ids, img_ids]).to(device)

    def theirs_edit(*, cached: bool) -> torch.Tensor:
        latents, cache = noise, None
        for i in range(args.steps):
            t = sigmas[i : i + 1].to(dtype)
            if cached and i > 0:
                velocity = theirs(
                    latents,
                    txt,
                    t,
                    img_ids.to(device),
                    txt_ids.to(device),
                    return_dict=False,
                    kv_cache=cache,
                    kv_cache_mode="cached",
                )[0]
            else:
                both = torch.cat([ref, latents], dim=1)
                mode = {"kv_cache_mode": "extract", "num_ref_tokens": len(ref_ids)} if cached else {}
                velocity, *rest = theirs(both, txt, t, both_ids, txt_ids.to(device), return_dict=False, **mode)
                cache = rest[0] if rest else None
                velocity = velocity[:, -noise.shape[1] :]
            latents = euler_step(latents, velocity, sigma=sigmas[i], next_sigma=sigmas[i + 1]).to(dtype)
        return latents

    def ours_edit(references: ReferenceKV | None) -> torch.Tensor:
        if references is None:
            references = ours.prefill(ref, ref_ids)
        latents = noise.float()
        rope = ours.rope(torch.cat([txt_ids, img_ids]))
        for i in range(args.steps):
            # the level in the dtype of the model, as diffusers has it, so that the pictures can be compared
            velocity = ours(
                latents.to(dtype),
                txt,
                sigmas[i].to(dtype),
                img_ids=img_ids,
                txt_ids=txt_ids,
                references=references,
                rope=rope,
            )
            latents = euler_step(latents, velocity, sigma=sigmas[i], next_sigma=sigmas[i + 1])
        return latents

    def seconds(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    with torch.no_grad():
        kept = ours.prefill(ref, ref_ids)
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "standard": lambda: theirs_edit(cached=False),
            "diffusers_kv": lambda: theirs_edit(cached=True),
            "limner_cold": lambda: ours_edit(None),
            "limner_warm": lambda: ours_edit(kept),
        }
        measured: dict[str, list[float]] = {name: [] for name in runs}
        results: dict[str, torch.Tensor] = {}
        for round_number in range(args.rounds):
            for name, run in runs.items():
                took, results[name] = seconds(run)
                measured[name].append(took)
                print(f"round {round_number + 1}: {name} {took:.2f} s", flush=True)
    median = {name: round(statistics.median(values), 3) for name, values in measured.items()}
    expected = results["diffusers_kv"].float()
    line = json.dumps(
        {
            "benchmark": "step",
            "seconds": median,
            "all_seconds": {name: [round(v, 3) for v in values] for name, values in measured.items()},
            "cold_over_diffusers_kv": round(median["diffusers_kv"] / median["limner_cold"], 3),
            "warm_over_diffusers_kv": round(median["diffusers_kv"] / median["limner_warm"], 3),
            "relative_difference": round(((results["limner_cold"] - expected).norm() / expected.norm()).item(), 5),
            "cold_equals_warm": torch.equal(results["limner_cold"], results["limner_warm"]),
            "geometry": {
                "hidden": config.width, "double": args.double, "single": args.single, "text": args.text,
                "output": noise.shape[1], "reference": len(ref_ids), "steps": args.steps, "dtype": args.dtype,
            },
            "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {"limner": limner.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "date": date.today().isoformat(),
            "arithmetic": ours.arithmetic,
            "command": shlex.join(["python", *sys.argv]),
        }
    )  # fmt: skip
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
