"""Commands and scripts in this process: what a process of their own would print and return, without its seconds of imports."""

from __future__ import annotations

import contextlib
import io
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from limner.cli import main


def run(*args: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run `limner` with these arguments, in a folder; warnings of the log are on stderr as they are without handlers."""
    words = [str(arg) for arg in args]
    return _captured(words, lambda: main(words), cwd=cwd)


def run_script(file: Path, *args: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run a Python file as `python FILE ARGS` does."""
    words = [str(arg) for arg in args]

    def call() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(file), *words])
            patch.syspath_prepend(str(file.parent))
            runpy.run_path(str(file), run_name="__main__")

    return _captured([str(file), *words], call, cwd=cwd)


def _captured(words: list[str], call: Callable[[], int | None], *, cwd: Path | None) -> CompletedProcess[str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(_warnings_on(err))
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) or stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=err)
    return CompletedProcess(words, code or 0, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _warnings_on(stream: io.StringIO) -> Iterator[None]:
    """Write warnings of the log as `logging.lastResort` does, which does nothing beside pytest's handlers."""
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
