"""Writes docs/cli.md, all commands and their options; a test tells when it is not up to date.

.venv/bin/python docs/cli.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from limner.cli import build_parser
from limner.cli.parser import commands_of
from limner.deploy.options import DeployOptions
from limner.options import options_of

FILE = Path(__file__).with_suffix(".md")
START = """\
# The command line

Written by `docs/cli.py` from the parsers; do not edit. `python -m limner` is the same as `limner`.

Exit codes: 0 it is done; 1 it is done, and something is damaged or a row failed; 2 it was refused, one line on stderr says
why; 130 it was interrupted.
"""
YAML = """
## Keys of a deployment's YAML

The `args` of [deploy.yaml](deploy.yaml) are the options of `limner deploy`, with `_` for `-` and without the dashes
before them, but for the address of the cluster and where it listens. Keys that differ, or have no option:

| key | option | meaning |
|---|---|---|
"""


def document() -> str:
    """Return what docs/cli.md has to say."""
    return START + "".join(_command(parser) for parser in commands_of(build_parser())) + YAML + "".join(_keys())


def _command(parser: argparse.ArgumentParser) -> str:
    needed = [_typed(one, one.option_strings[:1]) for one in _shown(parser._actions) if one.required]
    lines = [
        f"\n## {parser.prog}\n",
        f"{parser.description}\n",
        "```",
        " ".join([parser.prog, *needed, "[OPTION ...]"]),
    ]
    lines.append("```\n")
    titles = {"positional arguments": "argument", "options": "option"}
    for group in parser._action_groups:
        rows = [_row(parser, one) for one in _shown(group._group_actions)]
        if rows:
            lines += [f"| {titles.get(str(group.title), group.title)} | |", "|---|---|", *rows, ""]
    if examples := getattr(parser, "examples", ()):
        lines += ["```text", *examples, "```", ""]
    return "\n".join(lines)


def _shown(actions: list[argparse.Action]) -> list[argparse.Action]:
    return [one for one in actions if one.help != argparse.SUPPRESS and not isinstance(one, argparse._HelpAction)]


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
    meaning += " (required)" * (action.required and bool(action.option_strings))
    name = _typed(action, action.option_strings).replace("|", "\\|")
    return f"| `{name}` | {_escaped(meaning)} |"


def _typed(action: argparse.Action, names: Sequence[str]) -> str:
    """Return an argument as it is typed, by these of its names."""
    return " ".join(part for part in (", ".join(names), _values(action)) if part)


def _values(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    one = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else action.metavar
    one = one or action.dest.upper()
    return {"+": f"{one} ...", "*": f"[{one} ...]", "?": f"[{one}]"}.get(str(action.nargs), one)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _keys() -> Iterator[str]:
    for option in options_of(DeployOptions):
        if option.flag is None or option.flag != "--" + option.name.replace("_", "-"):
            flag = f"`{option.flag}`" if option.flag else ""
            yield f"| `{option.name}` | {flag} | {_escaped(option.help)} |\n"


if __name__ == "__main__":
    FILE.write_text(document())
