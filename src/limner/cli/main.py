"""The parser of all commands, and running one: its errors to one line on stderr, and an exit code.

Exit codes: 0 done, 1 done and something is damaged or failed, 2 refused, 130 interrupted. Imports nothing heavy, so that
`limner --help` is quick; knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from limner import ranks
from limner.cli import batch, bench, draw, mcp, plan, refs, serve, setup, verify, weights
from limner.cli.names import error_text
from limner.cli.parser import Parser, options_of
from limner.errors import InvalidRequest, LimnerError
from limner.version import __version__

__all__ = ["build_parser", "main"]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. `run` of what it parses is the command's handler."""
    parser = Parser(
        prog="limner",
        description="Draw and edit pictures; the K/V of references are computed once and kept.",
        examples=(
            "limner samples pictures",
            'limner edit "use the background of image 2" -i pictures/cat.png -i pictures/beach.png',
            "limner serve",
            "limner doctor",
        ),
    )
    parser.add_argument("--version", action="version", version=f"limner {__version__}")
    parser.set_defaults(under_torchrun=False, root=parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for family in (draw, batch, weights, verify, plan, bench, serve, mcp, refs, setup):
        family.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    with contextlib.ExitStack() as stack:
        if not ranks.speaks():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if sys.stderr is None:  # closed, as with 2>&-
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        try:
            code = _main(argv)
        except SystemExit:  # --help, or what the parser refuses
            if _printed() != 0:
                raise SystemExit(1) from None
            raise
        unprinted = _printed()
        return code or unprinted


def _main(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int | None] = args.run
    try:
        if ranks.started() and not args.under_torchrun:
            _refuse_several(args.command)
        code = run(args)
    except LimnerError as error:
        print(f"limner: {error_text(error, options_of(args), typed=args.parser.typed)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        if _printed("\n") != 0:  # a write to any other file fails in the same words
            return 1
        print(f"limner: a file cannot be read or written ({error.strerror})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("limner: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _printed(last: str = "") -> int:
    """Flush what was printed, which the interpreter would do too late for an exit code; return 1 if it cannot be."""
    try:
        if sys.stdout is not None:
            sys.stdout.write(last)
            sys.stdout.flush()
    except OSError as error:
        _tell_unprinted(error)
        return 1
    return 0


def _tell_unprinted(error: OSError) -> None:
    _drop_output()
    if not isinstance(error, BrokenPipeError):
        print(f"limner: stdout cannot be written ({error.strerror})", file=sys.stderr)


def _drop_output() -> None:
    """Drop what is printed: whoever read it has left, as `| head` does, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_several(command: str) -> NoReturn:
    """Refuse a command that torchrun started several times."""
    if not ranks.speaks():
        ranks.exit_silently()
    raise InvalidRequest(
        command,
        f"runs in one process, and torchrun started {os.environ['WORLD_SIZE']}; start it without torchrun (edit and "
        "generate run under it)",
    )
