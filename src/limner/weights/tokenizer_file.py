"""What a tokenizer.json may be made of: the parts of Qwen's, which take time and memory in proportion to the text.

The library runs any regular expression in the file, and some take exponential time; it also runs any number of steps that
each make the text longer. Checked before the library reads the file, since it tokenizes some texts as it does. Knows no
folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from limner.errors import CheckpointError

__all__ = ["QWEN_WORDS", "check_tokenizer"]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = _WORDS.format(digits=r"\p{N}") + _SPACES
_PATTERNS = frozenset(
    {
        *(_WORDS.format(digits=digits) + _SPACES for digits in (r"\p{N}", r"\p{N}{1,3}", r"\p{N}{1,2}")),
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    }
)
"""Splitting as Qwen, Llama 3 and GPT-2 do it: no repetition inside another one."""
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "model": ("BPE", "WordLevel"),
    "normalizer": ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip"),
    "pre_tokenizer": ("Sequence", "Split", "ByteLevel", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation"),
    "post_processor": ("Sequence", "ByteLevel", "TemplateProcessing"),
}
"""Types of each part. The decoder is not used."""
_MAX_STEPS = 16
_MAX_PIECES = 64
"""Tokens that a template puts around the text."""
_MAX_LENGTH = 1 << 17
"""Tokens that the file may pad to."""


def check_tokenizer(data: bytes, *, where: object) -> dict[str, Any]:
    """Return what a tokenizer.json holds. Raises `CheckpointError` if its parts may take long or grow without bounds."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON ({str(error)[:200]}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: has to hold a JSON object, not {type(value).__name__}; download it again")
    for part, allowed in _ALLOWED.items():
        steps = list(_steps(value.get(part)))
        if len(steps) > _MAX_STEPS:
            raise _refused(where, part, f"{len(steps)} steps; at most {_MAX_STEPS} are allowed")
        types = [step.get("type", "BPE" if part == "model" else None) for step in steps]  # older files name no model
        for name in types:
            if name not in allowed:
                raise _refused(where, part, f"a step {str(name)[:80]!r}; allowed: {', '.join(allowed)}")
        if types.count("ByteLevel") > 1:  # each may make the text longer
            raise _refused(where, part, "ByteLevel more than once")
        for step in steps:
            _check_step(step, part, where=where)
    _check_lengths(value.get("padding"), where=where)
    return value


def _steps(part: object) -> Iterator[dict[str, Any]]:
    """Yield a part, or what its sequences consist of."""
    left = [part]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            yield step
            for name in ("normalizers", "pretokenizers", "processors"):
                inner = step.get(name)
                left += inner if isinstance(inner, list) else []


def _check_step(step: Mapping[str, Any], part: str, *, where: object) -> None:
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and "Regex" in pattern and pattern["Regex"] not in _PATTERNS:
        shown = str(pattern["Regex"])
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise _refused(where, part, f"the regular expression {shown!r}; allowed: those of Qwen, Llama 3 and GPT-2")
    if step.get("type") == "TemplateProcessing":
        for name in ("single", "pair"):
            pieces = step.get(name)
            if isinstance(pieces, list) and len(pieces) > _MAX_PIECES:
                raise _refused(where, part, f"{len(pieces)} pieces in {name}; at most {_MAX_PIECES} are allowed")


def _check_lengths(padding: object, *, where: object) -> None:
    found = padding.get("strategy") if isinstance(padding, dict) else None
    length = found.get("Fixed") if isinstance(found, dict) else None
    if isinstance(length, int) and length > _MAX_LENGTH:
        raise _refused(where, "padding", f"{length} tokens; at most {_MAX_LENGTH} are allowed")


def _refused(where: object, part: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: {part} has {problem}; take the tokenizer of Qwen3")
