"""Decode a picture while the next one's steps run, beside one after the other: seconds until both are done, on a CPU.

Steps are forwards of 1 + 4 blocks of klein-4B's width with 1,536 tokens and 1,024 kept ones, bfloat16; the decoder is
FLUX.2's, bfloat16, 512x512; random weights. "at once" runs the decoder in a thread of its own; its numbers are threads of
steps and of the decoder. Ways take turns; medians and the shortest of all rounds. The last line is one JSON object.

    .venv/bin/python benchmarks/overlap.py -o benchmarks/results/overlap.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from limner.bench.measure import machine
from limner.config import TransformerConfig
from limner.model.autoencoder import Autoencoder
from limner.model.autoencoder_network import AutoencoderNetwork
from limner.model.transformer import Transformer
from limner.tokens import image_ids, reference_ids, text_ids


def work(*, tiny: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return one step, and the decoding of a picture."""
    torch.manual_seed(0)
    heads, side, text = (1, 4, 32) if tiny else (24, 32, 512)
    config = TransformerConfig(
        num_double_blocks=1, num_single_blocks=1 if tiny else 4, num_heads=heads, head_dim=128, text_width=7680
    )
    network = Transformer(config).bfloat16().eval()
    x, reference = (torch.randn(1, side * side, 128).bfloat16() for _ in range(2))
    words, ids = torch.randn(1, text, 7680).bfloat16(), image_ids((side, side))
    kept = network.prefill(reference, reference_ids([(side, side)]))
    decoder = Autoencoder(AutoencoderNetwork({}).eval().bfloat16())
    latents = torch.randn(1, 32, 2 * side, 2 * side).bfloat16()

    def step() -> Any:
        return network(x, words, 0.5, img_ids=ids, txt_ids=text_ids(text), references=kept)

    return step, lambda: decoder.decode(latents)


def at_once(steps: Callable[[], Any], decode: Callable[[], Any], *, own: int, other: int) -> None:
    """Run both; the steps in this thread with `own` threads, the decoder in another with `other`."""
    before = torch.get_num_threads()

    def decoding() -> None:
        torch.set_num_threads(other)
        with torch.no_grad():
            decode()

    thread = threading.Thread(target=decoding)
    thread.start()
    torch.set_num_threads(own)
    steps()
    thread.join()
    torch.set_num_threads(before)


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="forwards beside one decoding")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON")
    args = parser.parse_args(given)
    step, decode = work(tiny=args.tiny)
    threads = torch.get_num_threads()

    def steps() -> None:
        for _ in range(args.steps):
            step()

    def in_turn() -> None:
        steps()
        decode()

    ways: dict[str, Callable[[], Any]] = {
        "decode alone": decode,
        "steps alone": steps,
        "in turn": in_turn,
        f"at once, {threads} and {threads}": lambda: at_once(steps, decode, own=threads, other=threads),
        f"at once, {threads} and 1": lambda: at_once(steps, decode, own=threads, other=1),
        f"at once, {max(1, threads - 1)} and 1": lambda: at_once(steps, decode, own=max(1, threads - 1), other=1),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):  # the first one warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                taken[name].append(round(time.perf_counter() - start, 3))
    report = {
        "benchmark": "overlap",
        **machine(torch.device("cpu")),
        "command": shlex.join(["benchmarks/overlap.py", *(sys.argv[1:] if given is None else given)]),
        "steps": args.steps,
        "median_seconds": {name: statistics.median(all_) for name, all_ in taken.items()},
        "shortest_seconds": {name: min(all_) for name, all_ in taken.items()},
        "all_seconds": taken,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
