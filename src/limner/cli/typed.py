"""What was typed, where it is not what a shell or a parser takes it for: signs of typography, one dash, several values.

Owns these slips, what is said of them, and how numbers are written. Knows no command.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence

__all__ = ["PICTURES", "number", "several_values", "slip", "unclosed_quote", "whole"]

Options = Mapping[str, argparse.Action]
"""The options of a command, by how they are typed."""
_ENDS = {
    "\u201c": "\u201d",
    "\u201d": "\u201d",
    "\u201e": "\u201c\u201d",
    "\u2018": "\u2019",
    "\u2019": "\u2019",
    "\u201a": "\u2018\u2019",
    "\u00ab": "\u00bb",
}
"""Quotes of typography, and what ends each."""
_QUOTES = frozenset("".join([*_ENDS, *_ENDS.values()]))
_TEXTS = ("negative_prompt",)
"""Options that take any text."""
_LONG_DASHES = "\u2012\u2013\u2014\u2015\u2212"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp")
"""Suffixes of pictures, also of those that are not read."""
_NAME = re.compile(r"\S+\.\w{2,12}")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def slip(words: Sequence[str], options: Options, *, has_prompt: bool) -> str | None:
    """Return what is wrong with the first word that is an option or value but for its dashes or quotes; else None.

    Prompts may be in any quotes. `has_prompt`: what stands by itself is one.
    """
    before: argparse.Action | None = None
    for word in itertools.takewhile(lambda word: word != "--", words):
        takes_it = before is not None and before.nargs != 0
        is_text = before is not None and before.dest in _TEXTS if takes_it else has_prompt
        before = options.get(word)
        name = word.partition("=")[0]
        bare = name.lstrip(f"-{_LONG_DASHES}")
        right = f"--{bare}" if len(bare) > 1 else f"-{bare}"
        if bare and name not in options and right in options and name[0] in _LONG_DASHES:
            return f"{name}: begins with {name[0]}, as texts have it, and is no option; type {right}"
        if name not in options and right in options and name == f"-{bare}":
            return f"{name}: long options have two dashes; did you mean {right}?"
        inside = word[1:-1]
        in_quotes = inside and word[-1] in _ENDS.get(word[0], "") and not _QUOTES.intersection(inside)
        if in_quotes and not is_text and " " not in word:
            return f"{word}: {word[0]} and {word[-1]} are no quotes for a shell, but part of the word; type {inside}"
    return None


def unclosed_quote(words: Sequence[str]) -> str | None:
    """Return what is wrong where a text in quotes of typography came apart into words; else None."""
    for word in words:
        if word[:1] in _ENDS and not any(end in word[1:] for end in _ENDS[word[0]]):
            return f"{word}: {word[0]} is no quote for a shell, and each word counts by itself; quote with \" or '"
    return None


def several_values(words: Sequence[str], options: Options) -> str | None:
    """Return what is wrong where several files or numbers stand behind an option that takes one each time; else None."""
    for at, word in enumerate(words):
        action = options.get(word)
        if isinstance(action, argparse._AppendAction) and action.nargs is None:
            kind = _kind(words[at + 1]) if at + 1 < len(words) else None
            values = list(itertools.takewhile(lambda value: _kind(value) == kind, words[at + 1 :]))  # noqa: B023
            if kind is not None and len(values) > 1:
                again = " ".join(f"{word} {value}" for value in values[:3])
                return (
                    f"{word}: takes one value, and is given again for each: {again}{' ...' if len(values) > 3 else ''}"
                )
    return None


def _kind(word: str) -> str | None:
    """Return what kind of value a word is: pictures and files by their suffix, numbers; None for any other word."""
    suffix = os.path.splitext(word)[1].lower()
    if _NUMBER.fullmatch(word):
        return "number"
    if word.startswith("-") or not (_NAME.fullmatch(word) or os.path.exists(word)):
        return None
    return "picture" if suffix in PICTURES else suffix


def whole(text: str) -> int:
    """Read a whole number: "4", and "4.0", which is one. Raises `ArgumentTypeError`."""
    if re.fullmatch(r"[+-]?\d{1,100}(?:\.0*)?", text.strip()):
        return int(text.partition(".")[0])
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{_hint(text.strip())}")


def number(text: str) -> float:
    """Read a number. Raises `ArgumentTypeError`, with what was meant by percent and a decimal comma."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number{_hint(text.strip())}")
    return found


def _hint(text: str) -> str:
    if found := re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", text):
        return f"; did you mean {float(found[1]) / 100:g}?"
    if re.fullmatch(r"\d{1,3}(?:[,_' ]\d{3})+", text):
        return f"; did you mean {re.sub('[^0-9]', '', text)}?"
    if found := re.fullmatch(r"(\d+),(\d+)", text):
        return f"; did you mean {found[1]}.{found[2]}?"
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*[a-zA-Z]+", text):
        return f"; give it without a unit, as {found[1]}"
    return "; give one in digits, as 4"
