"""Requests that wait for one engine, with their pictures decoded beside the next one's steps and in turn, on a CPU.

The transformer has 1 + 4 blocks of klein-4B's width, the autoencoder is FLUX.2's, bfloat16, random weights. Each request
is a picture of 512x512 in 4 steps, over one 512x512 reference that all share; they do not run as a batch. Seconds are
from the first request until all have their pictures. The two ways take turns; medians and the shortest of all rounds.
The last line is one JSON object.

    .venv/bin/python benchmarks/overlap.py -o benchmarks/results/overlap.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from limner.bench.measure import machine
from limner.bench.models import TINY, random_pipeline
from limner.config import MODELS, TransformerConfig
from limner.engine import EditRequest, EditResult, Engine, future_of
from limner.images import prepare_references
from limner.pipeline import Pipeline

WAYS = {"in turn": False, "beside": True}


def pipeline(*, tiny: bool) -> Pipeline:
    """Return a pipeline over random weights, which loads nothing."""
    geometry = TINY
    if not tiny:
        width = TINY.text_encoder.width * TINY.text_encoder.num_used
        transformer = TransformerConfig(
            num_double_blocks=1, num_single_blocks=4, num_heads=24, head_dim=128, text_width=width
        )
        geometry = replace(TINY, transformer=transformer, autoencoder=MODELS["klein-4b"].autoencoder)
    torch.manual_seed(0)
    return Pipeline.from_diffusers(random_pipeline(geometry, dtype=torch.bfloat16))


def seconds_of(
    pipe: Pipeline, requests: Sequence[EditRequest], *, decode_beside: bool
) -> tuple[float, list[EditResult]]:
    """Submit all requests at once; return the seconds until the last has its picture, and the results."""
    engine = Engine(pipe, max_batch=1, previews=False, decode_beside=decode_beside)
    start = time.perf_counter()
    found = [future.result() for future in [future_of(engine, request) for request in requests]]
    seconds = time.perf_counter() - start
    engine.close()
    return seconds, found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="that wait together")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON")
    args = parser.parse_args(given)
    side, pipe = 64 if args.tiny else 512, pipeline(tiny=args.tiny)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    references = tuple(prepare_references([Image.fromarray(noise)], policy=pipe.reference_policy))
    requests = [EditRequest(prompt=f"picture {i}", seeds=(i,), references=references) for i in range(args.requests)]
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    pictures: dict[str, list[Any]] = {}
    for turn in range(args.rounds + 1):  # the first one warms up, and computes the K/V
        for way, decode_beside in WAYS.items():
            seconds, results = seconds_of(pipe, requests, decode_beside=decode_beside)
            if turn:
                taken[way].append(round(seconds, 3))
            pictures[way] = [np.asarray(one.images[0]).astype(int) for one in results]
    differences = [np.abs(a - b) for a, b in zip(*pictures.values(), strict=True)]
    report = {
        "benchmark": "overlap",
        **machine(torch.device("cpu")),
        "command": shlex.join(["benchmarks/overlap.py", *(sys.argv[1:] if given is None else given)]),
        "requests": args.requests,
        "median_seconds": {way: statistics.median(all_) for way, all_ in taken.items()},
        "shortest_seconds": {way: min(all_) for way, all_ in taken.items()},
        "all_seconds": taken,
        "mean_difference_of_255": round(float(np.mean(differences)), 4),
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
