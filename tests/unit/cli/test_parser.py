"""Errors of the parser say what was probably meant; help ends with examples that the parser itself takes."""

from __future__ import annotations

import argparse
import shlex

import pytest

from limner.cli.main import build_parser, main
from limner.cli.parser import commands_of

COMMANDS = {parser.prog: parser for parser in commands_of(build_parser())}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edti"], "argument COMMAND: 'edti' is not a command; did you mean edit? there are edit, generate, "),
        (
            ["edit", "a", "--sed", "4"],
            "--sed: limner edit has no such option; did you mean --seed N?; see limner edit --help",
        ),
        (["edit", "a", "--imgae=b"], "--imgae: limner edit has no such option; did you mean --image FILE?"),
        (
            ["generate", "a", "--port", "4"],
            "--port: limner generate has no such option; it is an option of limner serve",
        ),
        (
            ["serve", "--frobnicate"],
            "--frobnicate: limner serve has no such option; leave it out; see limner serve --help",
        ),
        (["--seed=4", "edit", "a"], "--seed: belongs behind the command, as in limner edit --seed; see limner --help"),
        (["--seed", "4", "edit", "a"], "--seed: belongs behind the command, as in limner edit --seed"),
        (["-i", "a.png", "edit", "a"], "-i: belongs behind the command, as in limner edit -i"),
        (["refs", "--json", "ls"], "--json: belongs behind the command, as in limner refs ls --json"),
        (["edit", "put", "the", "cat"], "'the cat' is not expected here; quote a prompt of several words"),
        (["refs", "pak"], "'pak' is not a command; did you mean pack?"),
        (["bench", "--dtype", "float23"], "argument --dtype: 'float23' is not allowed; did you mean float32?"),
    ],
)
def test_what_was_meant(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.startswith("limner: ")
    assert shown.count("\n") == 1
    assert message in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands(name: str) -> None:
    """Every example is parsed by the command that shows it, alone or after a pipe."""
    parser = COMMANDS[name]
    examples = parser.examples  # type: ignore[attr-defined]
    assert examples
    assert all(example in parser.format_help() for example in examples)
    for example in examples:
        words = shlex.split(example.split(" | ")[-1].split(" > ")[0])
        found = build_parser().parse_args(words[1:])
        assert words[0] == "limner"
        assert isinstance(found, argparse.Namespace)
        assert found.parser.prog == name
