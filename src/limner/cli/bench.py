"""`limner bench`: a 4-step edit measured against diffusers.

Owns the report's file and table on the terminal. What is measured, and how, `limner.bench` knows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from limner.cli.options import DTYPES, Commands, check_at_least
from limner.cli.parser import add_command
from limner.errors import InvalidRequest
from limner.grid import PIXELS

__all__ = ["add_commands", "bench"]

_ENGINES = ("standard", "diffusers_kv", "cold", "warm", "int8_cold", "int8_warm")
_MORE_ENGINES = ("masked", "weighted", "warm_int8_kv", "joint", "int8_joint", "reuse", "int8_reuse")


def add_commands(commands: Commands) -> None:
    """Add `bench`."""
    parser = add_command(
        commands,
        "bench",
        help="measure a 4-step edit against diffusers",
        description="Measure a 4-step edit against diffusers: the same random weights, one run, medians.",
        examples=(
            "limner bench --references 1 2 --rounds 3 -o edit.json",
            "limner bench --references 1 --side 256 --engines diffusers_kv warm int8_warm",
        ),
    )
    parser.add_argument(
        "--references", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="numbers of references (1 2 4)"
    )
    parser.add_argument("--side", type=int, default=512, metavar="PX", help="side of the output (default: %(default)s)")
    parser.add_argument(
        "--reference-side", type=int, default=512, metavar="PX", help="side of a reference (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--text", type=int, default=512, metavar="N", help="text tokens (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="rounds; medians are taken (default: %(default)s)"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=(*_ENGINES, *_MORE_ENGINES),
        default=list(_ENGINES),
        help="what to measure (the first six)",
    )
    parser.add_argument(
        "--geometry",
        nargs=3,
        type=int,
        default=[8, 2, 6],
        metavar=("HEADS", "DOUBLE", "SINGLE"),
        help="heads of 128, double- and single-stream blocks (default: 8 2 6)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="arithmetic (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--kernel", metavar="KERNEL", help="attention kernel of Limner; default: the device's")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the JSON here, and the table next to it as .md")
    parser.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> None:
    """Measure all cases, write the report and print it."""
    import shlex

    import torch

    from limner.bench import Bench, BenchCase, as_markdown, geometry, machine
    from limner.pipeline import check_device

    check_device(args.device)
    _check(args)
    path = Path(args.output) if args.output else None
    if path is not None:  # before measuring for minutes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest("--output", f"{path.parent} cannot be made ({error.strerror})") from error
    config = geometry(*args.geometry)
    measured = Bench(config, dtype=getattr(torch, args.dtype), device=args.device)
    measured.ours.kernel = args.kernel
    cases = [
        BenchCase(
            num_references=number,
            side=args.side,
            reference_side=args.reference_side,
            batch=args.batch,
            num_text=args.text,
        )
        for number in args.references
    ]
    report: dict[str, Any] = {
        "benchmark": "edit",
        **machine(measured.device),
        "dtype": args.dtype,
        "geometry": {"hidden": config.width, "double": args.geometry[1], "single": args.geometry[2]},
        "command": shlex.join(["limner", *sys.argv[1:]]),
        "cases": [
            measured.run(case, rounds=args.rounds, engines=args.engines, progress=_print_progress) for case in cases
        ],
        "arithmetic": measured.ours.arithmetic,
    }
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(as_markdown(report) + "\n")
    print(as_markdown(report))
    print(json.dumps(report))


def _check(args: argparse.Namespace) -> None:
    from limner.model.attention import KERNELS

    check_at_least(0, args, "references")
    check_at_least(1, args, "side", "reference_side", "batch", "text", "rounds", "geometry")
    for flag, side in (("--side", args.side), ("--reference-side", args.reference_side)):
        if side % PIXELS:
            raise InvalidRequest(flag, f"{side} is not a multiple of {PIXELS}")
    if args.kernel is not None and args.kernel not in KERNELS:
        raise InvalidRequest("--kernel", f"{args.kernel!r} is not one of {', '.join(KERNELS)}")


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
