"""The command line has each option of `limner.options`, as its field says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import pytest

from limner.cli import build_parser
from limner.cli.options import add_options, check_at_least, from_args, open_optional_store, open_store, values_of
from limner.errors import InvalidRequest
from limner.options import ListenOptions, ModelOptions, ReplicaOptions, ServeOptions, StoreOptions, options_of

DEPLOY = [*options_of(ModelOptions), *options_of(StoreOptions), *options_of(ReplicaOptions), *options_of(ListenOptions)]
SERVE = [*options_of(ModelOptions), *options_of(StoreOptions), *options_of(ServeOptions)]
DEPLOY += [option for option in options_of(ServeOptions) if option.name not in ("standby", *vars(ListenOptions()))]
COMMANDS = {"serve": SERVE, "deploy": DEPLOY}


def arguments(command: str) -> Mapping[str, argparse.Action]:
    (commands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions}


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, ModelOptions, StoreOptions, ServeOptions)
    return parser.parse_args(list(words))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_is_an_argument_as_its_field_says(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMNER_STORE", raising=False)
    found = arguments(command)
    checked = 0
    for option in COMMANDS[command]:
        if option.flag is None:
            assert option.name not in found
            continue
        action = found[option.name]
        assert action.option_strings == [option.flag]
        assert action.default == (list(option.default) if isinstance(option.default, tuple) else option.default)
        assert tuple(action.choices or ()) == option.choices
        assert (action.help or "").startswith(option.help)
        checked += 1
    assert checked > 25


def test_options_of_a_command_are_those_of_the_classes() -> None:
    """What is no field is the command's own."""
    own = {
        command: set(arguments(command)) - {option.name for option in options} for command, options in COMMANDS.items()
    }
    assert own == {"serve": {"help", "new_key"}, "deploy": {"help", "address"}}


def test_nothing_given_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMNER_STORE", raising=False)
    for kind in (ModelOptions, StoreOptions, ServeOptions):
        assert from_args(kind, parsed()) == kind()
        assert from_args(kind, argparse.Namespace()) == kind()


def test_what_is_given_has_the_type_of_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "--allow-origin",
        "http://a",
        "--allow-origin",
        "http://b",
        "--lora",
        "x:0.5",
        "--drain",
        "2",
        "--fetch-urls",
    ]
    found: Any = from_args(ServeOptions, parsed(*words))
    assert (found.allow_origins, found.drain, found.fetch_urls) == (("http://a", "http://b"), 2.0, True)
    assert from_args(ModelOptions, parsed(*words)).loras == (("x", 0.5),)
    assert values_of(ModelOptions, parsed(*words))["loras"] == (("x", 0.5),)
    monkeypatch.setenv("LIMNER_STORE", "/kept")
    assert from_args(StoreOptions, parsed()).store == "/kept"
    assert from_args(StoreOptions, parsed("--store", "there")).store == "there"
    for bad in (["--dtype", "float8"], ["--max-batch", "few"], ["--lora", ":1"]):
        with pytest.raises((argparse.ArgumentError, SystemExit)):
            parsed(*bad)


def test_help_tells_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser()
    add_options(parser, ServeOptions, StoreOptions, without=("host",))
    text = parser.format_help()
    assert "images drawn at once (default: 10)" in text
    assert "s3://bucket/prefix (default: $LIMNER_STORE)" in text
    assert "--host" not in text
    assert "\nlimits:\n" in text


def test_stores_of_commands() -> None:
    with pytest.raises(InvalidRequest, match="--store: no folder or URL is given"):
        open_store(StoreOptions())
    assert open_optional_store(StoreOptions()) is None
    with pytest.raises(InvalidRequest, match="--store-cache: /near is a folder before a URL; add --store URL"):
        open_optional_store(StoreOptions(store_cache="/near"))


def test_numbers_that_are_too_small_are_named() -> None:
    args = argparse.Namespace(num_images=0, sides=[1, 0])
    with pytest.raises(InvalidRequest, match="--num-images: 0 has to be 1 or more"):
        check_at_least(1, args, "num_images")
    with pytest.raises(InvalidRequest, match=r"--sides: \[1, 0\] has to be 1 or more"):
        check_at_least(1, args, "sides")
    check_at_least(0, args, "num_images", "sides")
