"""`limner bench`: a 4-step edit measured against diffusers; its steps, or with `--whole` the call from prompt to PNG.

Owns the report's files and table on the terminal. What is measured, and how, `limner.bench` knows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from limner.cli.options import DTYPES, Commands, check_at_least
from limner.cli.parser import add_command
from limner.errors import InvalidRequest, MissingExtra
from limner.files import write_file
from limner.grid import MIN_SIDE, PIXELS

__all__ = ["add_commands", "bench"]

_ENGINES = ("standard", "diffusers_kv", "cold", "warm", "int8_cold", "int8_warm")
_GEOMETRY = [8, 2, 6]
_WHOLE = ("tiny", "small", "klein-4b", "klein-9b")
_MORE_ENGINES = ("masked", "weighted", "warm_int8_kv", "joint", "int8_joint", "reuse", "int8_reuse")


def add_commands(commands: Commands) -> None:
    """Add `bench`."""
    parser = add_command(
        commands,
        "bench",
        help="measure a 4-step edit against diffusers",
        description="Measure a 4-step edit against diffusers: the same random weights, one run, medians. Text encoder and "
        "autoencoder are left out, but with --whole, which measures calls from a prompt to the bytes of a PNG.",
        examples=(
            "limner bench --references 1 2 --rounds 3 -o edit.json",
            "limner bench --references 1 --side 256 --engines diffusers_kv warm int8_warm",
            "limner bench --whole klein-4b --references 1 --engines diffusers_kv warm int8_warm -o whole.json",
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
        default=list(_GEOMETRY),
        metavar=("HEADS", "DOUBLE", "SINGLE"),
        help="heads of 128, double- and single-stream blocks (default: 8 2 6)",
    )
    parser.add_argument(
        "--whole",
        nargs="?",
        const="small",
        choices=_WHOLE,
        metavar="SIZE",
        help=f"whole calls, of a model of this size: {', '.join(_WHOLE)} (small if none is given); the first six engines, "
        "without --geometry",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="arithmetic (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--kernel", metavar="KERNEL", help="attention kernel of Limner; default: the device's")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write the JSON here, and next to it the table as .md and of --whole the plot as .png",
    )
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
    common = {"dtype": args.dtype, "command": shlex.join(["limner", *sys.argv[1:]])}
    if args.whole is not None:
        _whole(args, path, common)
        return
    config = geometry(*args.geometry)
    measured = Bench(config, dtype=getattr(torch, args.dtype), device=args.device)
    measured.ours.kernel = args.kernel
    report: dict[str, Any] = {
        "benchmark": "edit",
        **machine(measured.device),
        **common,
        "geometry": {"hidden": config.width, "double": args.geometry[1], "single": args.geometry[2]},
        "cases": [
            measured.run(
                BenchCase(**_case(args, number)), rounds=args.rounds, engines=args.engines, progress=_print_progress
            )
            for number in args.references
        ],
        "arithmetic": measured.ours.arithmetic,
    }
    try:
        if path is not None:
            _write(path, json.dumps(report, indent=1))
            _write(path.with_suffix(".md"), as_markdown(report))
    finally:  # it was measured for minutes
        print(as_markdown(report))
        print(json.dumps(report))


def _write(path: Path, text: str) -> None:
    write_file(path, f"{text}\n".encode())


def _whole(args: argparse.Namespace, path: Path | None, common: dict[str, Any]) -> None:
    """Measure whole calls. The JSON is written after every round, so that what was measured is kept."""
    import torch

    from limner.bench import BenchCase, WholeBench, machine, whole_markdown
    from limner.bench.plot import save_phases

    _print_progress(f"making the weights of {args.whole}")
    measured = WholeBench(args.whole, dtype=getattr(torch, args.dtype), engines=args.engines, device=args.device)
    measured.use_kernel(args.kernel)
    report: dict[str, Any] = {"benchmark": "whole", **machine(measured.device), **common, "size": args.whole}
    report |= {"cases": [], "arithmetic": measured.arithmetic}

    def save(found: dict[str, Any]) -> None:
        cases = [one for one in report["cases"] if one["case"] != found["case"]]
        report["cases"] = [*cases, found]
        if path is not None:
            _write(path, json.dumps(report, indent=1))

    for number in args.references:
        measured.run(BenchCase(**_case(args, number)), rounds=args.rounds, progress=_print_progress, save=save)
    try:
        if path is not None:
            _write(path.with_suffix(".md"), whole_markdown(report))
            save_phases(report, path.with_suffix(".png"))
    except MissingExtra as error:
        _print_progress(f"limner: no plot was drawn: {error}")
    finally:
        print(whole_markdown(report))
        print(json.dumps(report))


def _case(args: argparse.Namespace, num_references: int) -> dict[str, int]:
    return {
        "num_references": num_references,
        "side": args.side,
        "reference_side": args.reference_side,
        "batch": args.batch,
        "num_text": args.text,
    }


def _check(args: argparse.Namespace) -> None:
    from limner.model.attention import KERNELS

    check_at_least(0, args, "references")
    check_at_least(1, args, "side", "reference_side", "batch", "text", "rounds", "geometry")
    for flag, side in (("--side", args.side), ("--reference-side", args.reference_side)):
        if side % PIXELS:
            raise InvalidRequest(flag, f"{side} is not a multiple of {PIXELS}")
    if args.whole is not None:
        _check_whole(args)
    if args.kernel is not None and args.kernel not in KERNELS:
        raise InvalidRequest("--kernel", f"{args.kernel!r} is not one of {', '.join(KERNELS)}")


def _check_whole(args: argparse.Namespace) -> None:
    unknown = [name for name in args.engines if name not in _ENGINES]
    if unknown:
        raise InvalidRequest("--engines", f"{unknown[0]!r} is not measured with --whole; use {', '.join(_ENGINES)}")
    if args.geometry != _GEOMETRY:
        raise InvalidRequest("--geometry", f"{args.geometry} is not for --whole; give it a size: {', '.join(_WHOLE)}")
    for name, low, what in (("side", MIN_SIDE, "output"), ("reference_side", MIN_SIDE, "reference")):
        if getattr(args, name) < low:
            raise InvalidRequest(
                f"--{name.replace('_', '-')}",
                f"{getattr(args, name)} is too small for a whole call's {what}; use {low} or more",
            )
    if len(set(args.references)) < len(args.references):
        raise InvalidRequest("--references", f"{args.references} has a number twice; give each once")


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
