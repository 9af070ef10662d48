"""Arguments of the command line from the fields of options classes, and options from what was parsed.

Owns how values are written on the command line: sizes, seeds, LoRAs with a strength. The options that other layers read
too are declared in `limner.options`; those of one command alone stand in its file.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, get_args

from limner.errors import InvalidRequest
from limner.options import Dtype, Option, StoreOptions, options_of

if TYPE_CHECKING:
    from limner.store import ReferenceStore

__all__ = [
    "DTYPES",
    "Commands",
    "add_json",
    "add_options",
    "amount",
    "check_at_least",
    "from_args",
    "open_optional_store",
    "open_store",
    "seed",
    "size",
    "store_named",
    "values_of",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `argparse.ArgumentParser.add_subparsers` returns, which has no public type."""
T = TypeVar("T")
DTYPES = get_args(Dtype)


def add_options(
    parser: argparse.ArgumentParser, *kinds: type, only: Collection[str] = (), without: Collection[str] = ()
) -> None:
    """Add an argument for each field of options classes, in the groups that the fields name.

    `only` these fields, if any are given, and none of `without`.
    """
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for kind in kinds:
        for option in options_of(kind):
            if option.flag is None or option.name in without or (only and option.name not in only):
                continue
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            _add(groups[option.group], option)


def _add(group: argparse._ActionsContainer, option: Option) -> None:
    assert option.flag is not None
    given: dict[str, Any] = {"dest": option.name, "help": _help(option)}
    if option.value_type is bool:
        group.add_argument(option.flag, action="store_true", **given)
        return
    given["default"] = list(option.default) if isinstance(option.default, tuple) else option.default
    if option.env is not None:
        given["default"] = os.environ.get(option.env, option.default)
    if option.is_list:
        given["action"] = "append"
    if option.choices:
        given["choices"] = option.choices
    else:
        read = amount if option.name.endswith("_bytes") else _READERS[option.value_type]
        given |= {"metavar": option.metavar, "type": read}
    group.add_argument(option.flag, **given)


def _help(option: Option) -> str:
    if option.env is not None:
        return f"{option.help} (default: ${option.env})"
    if option.default is None or option.default is False or option.is_list:
        return option.help
    return f"{option.help} (default: %(default)s)"


def values_of(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was parsed of the fields of an options class; a command need not have them all."""
    found = {option.name: getattr(args, option.name) for option in options_of(kind) if hasattr(args, option.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def from_args(kind: type[T], args: argparse.Namespace) -> T:
    """Return options of class `kind`, with its defaults where a command has no argument for a field."""
    return kind(**values_of(kind, args))


def add_json(parser: argparse._ActionsContainer, help: str = "print one JSON object") -> None:  # noqa: A002
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=help)


def open_store(options: StoreOptions, *, make: bool = True) -> ReferenceStore:
    """Return the store of a command that needs one. `make`: a folder that is not there is made.

    Nothing limits it but --store-bytes: another limit would remove what other commands kept. Raises `InvalidRequest`.
    """
    from limner.store import ReferenceStore

    if not options.store:
        raise InvalidRequest("--store", "no folder or URL is given; use --store STORE or set LIMNER_STORE")
    with store_named(options.store):
        return ReferenceStore.open(options.store, cache=options.store_cache, disk_bytes=options.store_bytes, make=make)


@contextlib.contextmanager
def store_named(store: str | None) -> Iterator[None]:
    """Name --store, or --store-cache before a URL, where an error has the name of an argument for a folder."""
    from limner.places import is_url

    try:
        yield
    except InvalidRequest as error:
        names = {"store": "--store", "disk_path": "--store-cache" if is_url(store or "") else "--store"}
        raise (error.of(names[error.field]) if error.field in names else error) from None


def open_optional_store(options: StoreOptions) -> ReferenceStore | None:
    """Return the store of a command that runs without one too. Raises `InvalidRequest`."""
    if options.store:
        return open_store(options)
    if options.store_cache is not None:
        raise InvalidRequest("--store-cache", f"{options.store_cache} is a folder before a URL; add --store URL")
    return None


def size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels; "512*768" and "512 X 768" are the same."""
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX*\u00d7]\s*(\d{1,6}))?\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as 512x512")
    if match[2] is None:
        raise argparse.ArgumentTypeError(f"{text!r} is one side of WIDTHxHEIGHT; did you mean {match[1]}x{match[1]}?")
    return int(match[1]), int(match[2])


def amount(text: str) -> int:
    """Read a number of bytes, as "20GiB" or in plain digits."""
    from limner.memory.amounts import parse_bytes

    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    try:
        return parse_bytes(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(error.problem) from None


def seed(text: str) -> int:
    """Read a seed, in plain digits."""
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def check_at_least(low: int, args: argparse.Namespace, *names: str) -> None:
    """Raise `InvalidRequest` where one of these numbers, or lists of numbers, is below `low`."""
    for name in names:
        values = getattr(args, name)
        if any(value < low for value in (values if isinstance(values, list) else [values])):
            raise InvalidRequest(f"--{name.replace('_', '-')}", f"{values} has to be {low} or more")


def _file_and_strength(text: str) -> tuple[str, float]:
    """Read FILE or FILE:STRENGTH; a file whose name has a colon is taken as it is."""
    file, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not file or not math.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"{text!r}: strength {strength!r} is not a finite number; give FILE or FILE:STRENGTH, as style.safetensors:0.8"
        )
    return file, value


_READERS: dict[Any, Callable[[str], object]] = {str: str, int: int, float: float, tuple[str, float]: _file_and_strength}
