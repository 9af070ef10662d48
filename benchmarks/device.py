"""What a GPU does with Limner: one run of at most 8 minutes that settles the most. Writes a JSON list of findings.

It asks whether pictures, tiers, limits and formats are right there, how fast steps are beside diffusers' K/V pipeline in
klein-9b's geometry, what memory they take, and whether the goals are met (`gpu/goals.py`). Cheap and decisive parts come
first; each has its own share of the time and its own errors, and stops no other. It needs no installation:

    PYTHONPATH=src python benchmarks/device.py -o benchmarks/results/gpu/device.json

Every part runs on a CPU with `--device cpu --tiny`, in seconds; `make test` does that.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu import correct, memory, speed
from gpu.goals import goals
from gpu.measure import Run

PARTS = [*correct.PARTS, *speed.PARTS[:-1], *memory.PARTS, speed.PARTS[-1]]


def main(words: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, in seconds")
    parser.add_argument("--budget", type=float, default=470, metavar="SECONDS")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS])
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(words)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    run = Run(torch.device(args.device), args.tiny, args.budget, args.output, args.quiet)
    for part in PARTS:
        if args.only is None or part.name in args.only:
            run.do(part)
    run.say("goals", goals=goals(run.findings))
    seconds = round(time.perf_counter() - run.start, 1)
    run.say("end", seconds=seconds, failures=[f"{found['part']} at {found['at']} s" for found in run.failures])
    return run


if __name__ == "__main__":
    sys.exit(1 if main().failures else 0)
