"""`limner samples`, `doctor` and `completion`: what a new installation needs first.

Owns what is printed. What is on a machine, `limner.doctor` knows.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from limner.cli.options import Commands, add_json
from limner.cli.output import print_result
from limner.cli.parser import add_command
from limner.errors import MissingExtra, OutputError

__all__ = ["add_commands", "completion", "doctor", "samples"]


def add_commands(commands: Commands) -> None:
    """Add `samples`, `doctor` and `completion`."""
    parser = add_command(
        commands,
        "samples",
        help="copy the sample pictures and a manifest to a folder",
        description="Copy the sample pictures and a manifest of a batch to a folder, to try Limner with.",
        examples=("limner samples", "limner samples pictures"),
    )
    parser.add_argument(
        "folder", nargs="?", default="samples", metavar="DIR", help="made if it is not there (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace other files of these names")
    add_json(parser)
    parser.set_defaults(run=samples)

    parser = add_command(
        commands,
        "doctor",
        help="say what this machine has: devices, kernels, versions, memory",
        description="Say what Limner finds here: devices, kernels, the compiler, versions, memory and disk. Exit code 1 if "
        "something keeps it from running.",
        examples=("limner doctor", "limner doctor --json"),
    )
    add_json(parser)
    parser.set_defaults(run=doctor)

    parser = add_command(
        commands,
        "completion",
        help="print what lets a shell complete commands and options",
        description="Print a script that lets a shell complete commands, options and files. Needs shtab.",
        examples=(
            "limner completion bash > ~/.local/share/bash-completion/completions/limner",
            "limner completion zsh > ~/.zfunc/_limner",
        ),
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    parser.set_defaults(run=completion)


def samples(args: argparse.Namespace) -> None:
    """Copy the samples. Raises `OutputError` where another file has the name of one, unless --force."""
    source, target = Path(__file__).parents[1] / "assets" / "samples", Path(args.folder)
    files = sorted(source.iterdir())
    if not args.folder or target.is_file():
        raise OutputError(f"DIR: {args.folder!r} is {'a file' if args.folder else 'empty'}; give another folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in files if not args.force else ():
            there = target / file.name
            if there.exists() and there.read_bytes() != file.read_bytes():
                raise OutputError(f"DIR: {there} is another file; add --force to replace it, or give another folder")
        for file in files:
            shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise OutputError(f"DIR: {target} cannot be written ({error.strerror}); give another folder") from error
    names = [str(target / file.name) for file in files]
    print_result(args, {"files": names}, "\n".join(names))


def doctor(args: argparse.Namespace) -> int:
    """Print what is found; return 1 if something keeps Limner from running."""
    from limner.doctor import examine

    report = examine()
    print_result(args, report.as_json(), "\n".join(report.lines()))
    return int(bool(report.problems))


def completion(args: argparse.Namespace) -> None:
    """Print the script for a shell."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MissingExtra("limner completion", package="shtab", extra="completion") from error
    print(shtab.complete(args.root, shell=args.shell))
