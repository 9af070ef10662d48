"""The command line's own names in errors and warnings: options, where others name arguments of a call.

Owns the one table of names that differ. What a command has no option for keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from limner.errors import CapacityError, InvalidRequest, LimnerError

__all__ = ["error_text", "in_options"]

_OTHERWISE = {
    "mask_image": "--mask",
    "width": "--size",
    "height": "--size",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "num_images_per_prompt": "--num-images",
    "reference_weights": "--reference-weight",
    "torch_dtype": "--dtype",
    "loras": "--lora",
}
"""Options that are called otherwise than the arguments of a call; all others have their names."""
_COUNTED = ("references", "size")
"""What does not fit, where a `CapacityError` begins with it: whatever options it comes from."""
_HEAD = re.compile(r"(?!image \d)(\w+)( [^:]*)?: ")  # a picture is called "image 2" in prompts too
_ARGUMENT = re.compile(r"(?<![\w'\"./=-])([a-z]+(?:_[a-z0-9]+)+)(?![\w'\"(=/]|\.\w)")
_GIVEN = re.compile(r"(?<![\w'\"./-])([a-z_]+)=(?:'(\w+)'|(?=[,;. ]|$))")
_BESIDE_MASK = re.compile(r"(--mask)((?:(?:,| and| or) (?:expand|strength|preserve)\b)+)")


def error_text(error: LimnerError, options: Collection[str], *, typed: Sequence[str] = ()) -> str:
    """Return an error as one line, in the names of a command with these options; `typed` as of `in_options`."""
    text = " ".join(str(error).split())
    if isinstance(error, CapacityError) and text.partition(":")[0] in _COUNTED:
        head, colon, text = text.partition(":")
        return head + colon + in_options(text, options, typed=typed)
    return in_options(text, options, typed=typed, with_file=isinstance(error, InvalidRequest))


def in_options(text: str, options: Collection[str], *, typed: Sequence[str] = (), with_file: bool = False) -> str:
    """Return a message about a call, in the names of a command with these options.

    The name of an argument stands first, before a colon; `with_file`: the name of a file may be behind it. Others are found
    in the text where nothing else can be meant. Of the words that were `typed`, as names of files are, none is changed.
    """
    from limner.images.reference import ASK_BACKGROUND, ASK_MAX_PIXELS

    def option(name: str) -> str | None:
        found = _OTHERWISE.get(name, f"--{name.replace('_', '-')}")
        return found if found in options else None

    def named(match: re.Match[str]) -> str:
        return option(match[1]) or match[0]

    def given(match: re.Match[str]) -> str:
        name = option("references_attention" if match[1] == "references" else match[1])
        return match[0] if name is None else f"{name} {match[2]}" if match[2] else name

    head, match = "", _HEAD.match(text)
    if match and (with_file or match[2] is None) and (name := option(match[1])) is not None:
        side = f"{match[1]} " if match[1] in ("width", "height") else ""
        head, text = f"{name}{match[2] or ''}: {side}", text[match.end() :]
    if "--background" in options:
        text = text.replace(ASK_BACKGROUND, "--background white")
    if "--max-pixels" in options:
        text = text.replace(ASK_MAX_PIXELS, "--max-pixels")
    parts = _values(typed).split(text)
    text = "".join(part if at % 2 else _GIVEN.sub(given, _ARGUMENT.sub(named, part)) for at, part in enumerate(parts))
    return head + _BESIDE_MASK.sub(lambda found: found[1] + re.sub(r"(?<= )\w{5,}", r"--\g<0>", found[2]), text)


def _values(typed: Sequence[str]) -> re.Pattern[str]:
    """Return what finds the values among the words of a command that look as if they had an argument's name, the longest
    first. A value is a word, or stands behind its option: --image=FILE, -iFILE, or before a number: FILE:0.5."""
    found = {part for word in typed for part in (word, word.partition("=")[2], word[2:], word.rpartition(":")[0])}
    found = {part for part in found if not part.startswith("-") and (_ARGUMENT.search(part) or _GIVEN.search(part))}
    return re.compile(f"({'|'.join(map(re.escape, sorted(found, key=len, reverse=True))) or '(?!)'})")
