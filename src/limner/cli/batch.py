"""`limner batch`: all rows of a manifest, in this process or on Ray.

Owns which of both draws, and what is printed of failures. Rows, results and resuming are `limner.batch`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from limner.cli.options import Commands, add_json, add_options, from_args, store_named
from limner.cli.output import BatchProgress, print_result
from limner.cli.parser import add_command
from limner.errors import InvalidRequest, OutputError, RemoteError
from limner.options import ModelOptions, StoreOptions

if TYPE_CHECKING:
    from limner.batch import Batch, BatchOptions, BatchSummary

__all__ = ["add_commands", "batch"]

_NUM_SHOWN = 10
"""Failures that are printed, and rows with warnings; all are in the results."""


def add_commands(commands: Commands) -> None:
    """Add `batch`."""
    parser = add_command(
        commands,
        "batch",
        help="draw all rows of a manifest; goes on where it was stopped",
        description="Draw all rows of a manifest; run again, it goes on where it was stopped. Exit code 1 if a row failed.",
        examples=(
            "limner batch rows.jsonl -o drawn",
            "limner batch rows.jsonl -o drawn --images-at-once 4 --format webp",
        ),
    )
    parser.add_argument(
        "manifest",
        metavar="MANIFEST",
        help='JSON lines: {"id": "a", "prompt": "...", "references": ["cat.png"], "seed": 1, "size": "512x512", '
        '"steps": 4, "fit": "pad", "mask": "mask.png", "strength": 0.8}, loras of docs/lora.md, and the other fields of '
        "docs/control.md; all but id and prompt may be left out; files are relative to the manifest",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="folder of <id>.png and results.jsonl; made if it is not there",
    )
    parser.add_argument(
        "--format", choices=("png", "jpeg", "webp"), default="png", help="of the pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--images-at-once",
        type=int,
        default=1,
        metavar="N",
        help="rows of equal references and size drawn side by side (default: %(default)s); with another number, pictures "
        "depend on it by rounding",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="draw on many processes: local (this machine), auto, or HOST:PORT of a Ray cluster",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --ray: processes; default: one a core, or a GPU")
    add_json(parser, help="print one JSON object: rows, failed, prefills, images a second")
    add_options(parser, ModelOptions, StoreOptions)
    parser.set_defaults(run=batch)


def batch(args: argparse.Namespace) -> int:
    """Draw all rows that are not done; return 1 if one failed."""
    from limner.batch import Batch
    from limner.engine.load import check_model

    if args.workers is not None and args.ray is None:
        raise InvalidRequest("--workers", f"{args.workers} processes are Ray's; add --ray")
    options = _batch_options(args)
    model = from_args(ModelOptions, args)
    check_model(model)
    with (
        store_named(args.store),
        contextlib.closing(BatchProgress()) as progress,
        Batch(options, progress=progress) as rows,
    ):
        if args.ray is None:
            _draw_here(rows, model)
        else:
            _draw_on_ray(rows, model, address=args.ray, workers=args.workers)
        summary = rows.finish()
    _print_warnings(rows, summary)
    _print_failures(rows, summary)
    print_result(args, asdict(summary), summary.describe())
    return int(summary.failed > 0)


def _batch_options(args: argparse.Namespace) -> BatchOptions:
    from limner.batch import BatchOptions
    from limner.errors import InvalidRequest
    from limner.places import absolute

    if not args.manifest:  # which a path would make "."
        raise InvalidRequest("manifest", "'' is no file name; give a file of JSON lines")
    return BatchOptions(
        manifest=Path(args.manifest),
        folder=Path(args.output),
        format=args.format,
        images_at_once=args.images_at_once,
        store=absolute(args.store) if args.store else None,
        store_bytes=args.store_bytes,
        store_cache=Path(os.path.abspath(args.store_cache)) if args.store_cache else None,
    )


def _draw_here(rows: Batch, model: ModelOptions) -> None:
    from limner.engine.load import load_pipeline
    from limner.pipeline import check_device

    check_device(model.device)
    with _with_a_remedy(rows):
        pipe = load_pipeline(model, store=rows.store)
        rows.draw(pipe, rows.plan(pipe))


def _draw_on_ray(rows: Batch, model: ModelOptions, *, address: str, workers: int | None) -> None:
    from limner.deploy.ray_batch import Cluster
    from limner.engine.load import load_pipeline

    with Cluster(address, workers=workers) as cluster:
        cluster.check(rows.options)
        with _with_a_remedy(rows):
            # what rows are and which are done depends on the weights, not on where they are
            groups = rows.plan(load_pipeline(replace(model, device="cpu"), store=rows.store))
            cluster.draw(rows, groups, model)


@contextlib.contextmanager
def _with_a_remedy(rows: Batch) -> Iterator[None]:
    """Say in an error how many rows are done and how to go on."""
    try:
        yield
    except (OutputError, RemoteError) as error:
        done = f"{rows.num_done} of {len(rows.rows)} rows are done and kept"
        raise type(error)(f"{error}; {done}: mend that and run the same command again") from error


def _print_failures(rows: Batch, summary: BatchSummary) -> None:
    from limner.images import printable

    for failure in rows.failures[:_NUM_SHOWN]:
        name = f" ({failure['id']})" if failure["id"] else ""
        print(printable(f"limner: line {failure['line']}{name}: {failure['error']['message']}"), file=sys.stderr)
    if len(rows.failures) > _NUM_SHOWN:
        print(f"limner: {len(rows.failures) - _NUM_SHOWN} more failed; see {summary.results}", file=sys.stderr)


def _print_warnings(rows: Batch, summary: BatchSummary) -> None:
    from limner.images import printable

    warned = rows.warned
    for result in warned[:_NUM_SHOWN]:
        for warning in result["warnings"]:
            print(printable(f"warning: line {result['line']} ({result['id']}): {warning}"), file=sys.stderr)
    if len(warned) > _NUM_SHOWN:
        print(f"warning: {len(warned) - _NUM_SHOWN} more rows have warnings; see {summary.results}", file=sys.stderr)
