"""`limner verify`: where pictures come from, by their metadata and C2PA manifests.

Owns what is printed and the exit code. Reading and checking are `limner.trust.provenance`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from limner.cli.options import Commands, add_json
from limner.cli.parser import add_command
from limner.errors import InvalidRequest

__all__ = ["add_commands", "verify"]


def add_commands(commands: Commands) -> None:
    """Add `verify`."""
    parser = add_command(
        commands,
        "verify",
        help="say where pictures come from: metadata and C2PA manifest",
        description="Read the metadata and check the C2PA manifest of pictures; exit code 1 if one is broken.",
        examples=("limner verify picture.png", "limner verify *.png --trust roots.pem --json"),
    )
    parser.add_argument("file", nargs="+", metavar="FILE", help="pictures: PNG, JPEG or WebP")
    parser.add_argument("--trust", metavar="PEM", help="root certificates that vouch for signers")
    add_json(parser)
    parser.set_defaults(run=verify)


def verify(args: argparse.Namespace) -> int:
    """Print where pictures come from; return 1 if a manifest is broken, 2 if a file cannot be read."""
    from limner.images import printable
    from limner.trust.provenance import read

    try:
        trust = Path(args.trust).read_bytes() if args.trust else None
    except (OSError, ValueError) as error:
        raise InvalidRequest("--trust", f"{args.trust} cannot be read ({error}); give a PEM file") from None
    code, found = 0, []
    for file in args.file:
        try:
            report = read(file, trust=trust)
        except InvalidRequest as error:  # the others are looked at all the same
            print(f"limner: {' '.join(str(error).split())}", file=sys.stderr)
            found.append({"file": file, "error": str(error)})
            code = 2
            continue
        found.append({"file": file, "whole": report.whole, **asdict(report)})
        code = max(code, int(not report.whole))
        if not args.json:
            print("\n  ".join([f"{printable(file)}:", *report.describe()]))
    if args.json:
        print(json.dumps({"files": found}))
    return code
