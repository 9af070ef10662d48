"""Limner's autoencoder beside diffusers' `AutoencoderKLFlux2`: FLUX.2's size, the same random weights, in one run.

Pictures are decoded and encoded by both in turn; times are medians of the rounds, also of processor time, which says more
where other programs run. Memory is how far the process grew above what it had before a call, at its highest (0 where the
system does not count), beside what `limner.memory` plans. Errors are those of 256x256 pixels against diffusers' in float32.
The last line is one JSON object; `-o` merges its cases into a file, so that they may be run one by one.

    .venv/bin/python benchmarks/autoencoder.py --sides 512 --dtypes float32 -o benchmarks/results/autoencoder.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.bench import machine
from limner.bench.measure import grown
from limner.config import MODELS
from limner.memory import Formats, Workload, phase_bytes
from limner.model.autoencoder import Autoencoder
from limner.model.autoencoder_network import AutoencoderNetwork

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Networks = dict[str, Any]
"""The network of each: `diffusers` and `limner`."""


def networks(dtype: torch.dtype) -> Networks:
    """Both networks with weights that keep the scale of their inputs."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    theirs = AutoencoderKLFlux2().eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    ours = AutoencoderNetwork({}).eval()
    ours.load_state_dict(theirs.state_dict())
    return {"diffusers": theirs.to(dtype), "limner": ours.to(dtype)}


def calls(both: Networks, side: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Decoding and encoding of a picture by each network."""
    torch.manual_seed(1)
    latents, pixels = torch.randn(1, 32, side // 8, side // 8).to(dtype), torch.rand(1, 3, side, side).to(dtype) * 2 - 1
    theirs, ours = both["diffusers"], Autoencoder(both["limner"])
    wrapped = Autoencoder(theirs)  # diffusers' network; only the normalising of latents is ours
    return {
        "decode": {"diffusers": lambda: theirs.decode(latents).sample, "limner": lambda: ours.decode(latents)},
        "encode": {"diffusers": lambda: wrapped.encode(pixels), "limner": lambda: ours.encode(pixels)},
    }


def planned(side: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that `limner.memory` counts for the activations of a picture."""
    workload = Workload(size=(side, side), references=((side, side),))
    phases = phase_bytes(MODELS["klein-4b"], workload, formats=Formats(itemsize=dtype.itemsize))
    return {"decode": phases["decode"], "encode": phases["encode references"]}


def timed(call: Callable[[], Tensor], walls: list[float], cpus: list[float]) -> None:
    """Make a call, and add its seconds and those of processor time to lists."""
    start, busy = time.perf_counter(), time.process_time()
    call()
    walls.append(round(time.perf_counter() - start, 3))
    cpus.append(round(time.process_time() - busy, 3))


def measured(both: Networks, side: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what, by in calls(both, side, dtype).items():
        memory, walls, cpus = ({name: [] for name in by} for _ in range(3))
        for _ in range(rounds):
            for name, call in by.items():
                memory[name].append(grown(partial(timed, call, walls[name], cpus[name])) >> 20)
        found[what] = {
            name: {
                "seconds": statistics.median(walls[name]),
                "cpu_seconds": statistics.median(cpus[name]),
                "rounds": walls[name],
                "grown_mib": max(memory[name]),
            }
            for name in by
        }
        theirs, ours = found[what]["diffusers"], found[what]["limner"]
        found[what]["times_as_fast"] = round(theirs["seconds"] / ours["seconds"], 2)
        found[what]["planned_mib"] = planned(side, dtype)[what] >> 20
        print(f"{what} {side} {dtype}: {json.dumps(found[what])}", flush=True)
    return found


def errors(both: Networks, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Largest and mean difference of each from diffusers' network in float32, at 256x256."""
    wide = {name: network.to(torch.float32) for name, network in both.items()}
    exact = {what: by["diffusers"]() for what, by in calls(wide, 256, torch.float32).items()}
    for network in both.values():
        network.to(dtype)
    found = {}
    for what, by in calls(both, 256, dtype).items():
        for name, call in by.items():
            difference = (call().float() - exact[what]).abs()
            found[f"{what} {name}"] = {"largest": difference.max().item(), "mean": difference.mean().item()}
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="pixels on a side")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    how = {**machine(torch.device("cpu")), "command": shlex.join(["benchmarks/autoencoder.py", *sys.argv[1:]])}
    cases: dict[str, Any] = {}
    for dtype in args.dtypes:
        both = networks(DTYPES[dtype])
        how["arithmetic"] = Autoencoder(both["limner"]).arithmetic
        cases[f"{dtype} errors"] = how | errors(both, DTYPES[dtype])
        for side in args.sides:
            cases[f"{dtype} {side}"] = how | measured(both, side, DTYPES[dtype], args.rounds)
    before = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    result = {"benchmark": "autoencoder", "cases": before.get("cases", {}) | cases}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
