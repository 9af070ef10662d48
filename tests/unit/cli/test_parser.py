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
        (
            ["edit", "-i", "a.png", "b.jpg", "-p", "x"],
            "-i: takes one value, and is given again for each: -i a.png -i b.jpg",
        ),
        (["edit", "x", "-i", "a.png", "--lora", "a.safetensors", "b.safetensors"], "--lora a.safetensors --lora b.saf"),
        (
            ["edit", "x", "-i", "a", "-p"],
            "-p: limner edit has no such option; PROMPT stands by itself, as in limner edit ",
        ),
        (["edit", "\u201cput", "the", "cat\u201d", "-i", "a"], "\u201cput: \u201c is no quote for a shell"),
        (["edit", "x", "-i", "\u201ca.png\u201d"], "type a.png; see limner edit --help"),
        (["verify", "\u00aba.png\u00bb"], "type a.png; see limner verify --help"),
        (["edit", "x", "-i", "a", "--size", "\u201c512x512\u201d"], "type 512x512; see limner edit --help"),
        (
            ["edit", "x", "\u2014seed", "4"],
            "\u2014seed: begins with \u2014, as texts have it, and is no option; type --seed",
        ),
        (["edit", "x", "-image", "a.png"], "-image: long options have two dashes; did you mean --image?"),
        (["edit", "x", "--num-inference-steps", "4"], "did you mean --steps N?"),
        (["edit", "x", "--cfg-scale=4"], "did you mean --guidance X?"),
        (["generate", "x", "-W", "512"], "-W: limner generate has no such option; did you mean --size WxH?"),
        (["edit", "x", "--init-img", "a.png"], "did you mean --image FILE?"),
        (["edit", "x", "--diffusion-model", "a"], "did you mean --transformer FILE?"),
        (["edit", "x", "--lora-model-dir", "a"], "did you mean --lora FILE[:STRENGTH]?"),
        (["edit", "x", "--sampling-method", "euler"], "by Euler steps; leave it out"),
        (["edit", "x", "--mode", "a"], "--mode: limner edit has no such option; the command says it: limner edit or"),
        (["edit", "x", "--n", "4"], "--n: limner edit has no such option; did you mean --num-images N?"),
        (["edit", "x", "--prompt-file", "a"], "give - as the prompt, and the file on stdin"),
        (["edit", "x", "--strength", "60%"], "argument --strength: '60%' is not a number; did you mean 0.6?"),
        (["edit", "x", "--strength", "0,6"], "did you mean 0.6?"),
        (["edit", "x", "--steps", "4.5"], "argument --steps: '4.5' is not a whole number"),
        (["edit", "x", "--mask-blur", "8px"], "'8px' is not a whole number; give it without a unit, as 8"),
        (["edit", "x", "--size", "512"], "'512' is one side of WIDTHxHEIGHT; did you mean 512x512?"),
        (["verify", "a.png", "--trust", "x", "b.png"], "'b.png' is not expected here; give all FILE together"),
        (["refs", "ls", "kept"], "'kept' is not expected here; leave it out"),
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


def test_values_that_can_be_one_thing_only_are_taken() -> None:
    """Options may be cut short, also where what is left is another tool's name."""
    words = [
        "edit",
        "\u201chello\u201d on a sign",
        "-i",
        "a.png",
        "--steps",
        "4.0",
        "--size",
        "512 * 768",
        "--store-bytes",
    ]
    found = build_parser().parse_args([*words, "2GiB", "-ob.png", "--num", "3"])
    assert (found.prompt, found.output) == ("\u201chello\u201d on a sign", "b.png")
    assert (found.steps, found.size, found.store_bytes) == (4, (512, 768), 2 << 30)
    assert isinstance(found.steps, int)
    assert found.num_images == 3


@pytest.mark.parametrize(
    "prompt",
    ["\u201c\u798f\u201d\u5b57\u706f\u7b3c\uff0c\u5199\u7740\u201c\u798f\u201d", "\u00abHi\u00bb", "\u2018512\u2019"],
)
def test_a_prompt_may_be_in_any_quotes(prompt: str) -> None:
    for words in (["edit", prompt, "-i", "a.png"], ["edit", "-i", "a.png", prompt], ["generate", "--json", prompt]):
        assert build_parser().parse_args([*words, "--negative-prompt", prompt]).prompt == prompt


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
