"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2.

One file for each family of commands; each adds its parsers and has a handler named after each command. Imports nothing
heavy before a command runs; knows nothing of models beyond the public names of other packages.
"""

from limner.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
