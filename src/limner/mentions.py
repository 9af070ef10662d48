"""Pictures that a prompt mentions by number, as "image 2", and that the call does not have.

Owns how prompts name references. Knows no pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["missing_pictures"]

_WORD = r"(?:image|picture|photo|reference)"
_AFTER = r"(?![\d.,]*\d|\s*[:x%]\s*\d)"  # not 2.5, 16:9 or 4x3
_NUMBERED = re.compile(
    rf"\b{_WORD}s?\s*[#№]?\s*(\d{{1,2}})\b{_AFTER}(?:(?:\s*,\s*|\s*,?\s*(?:and|or|&)\s+)(\d{{1,2}})\b{_AFTER})*", re.I
)
_FURTHER = re.compile(r"\d{1,2}")
_ORDINALS = {"second": 2, "third": 3, "fourth": 4, "2nd": 2, "3rd": 3, "4th": 4}
_ORDINAL = re.compile(rf"\b({'|'.join(_ORDINALS)})\s+{_WORD}\b", re.I)
_MOST = 32
"""Larger numbers are not those of references: "photo 99"."""


def missing_pictures(prompts: Iterable[str], *, num_references: int) -> tuple[str, ...]:
    """Return a warning for each picture that prompts mention beyond the references, once and in the order of numbers."""
    found: dict[int, str] = {}
    for prompt in prompts:
        for match in _NUMBERED.finditer(prompt):
            for number in _FURTHER.findall(match[0]):
                found.setdefault(int(number), " ".join(match[0].split()))
        for match in _ORDINAL.finditer(prompt):
            found.setdefault(_ORDINALS[match[1].lower()], " ".join(match[0].split()))
    given = {0: "no reference", 1: "1 reference"}.get(num_references, f"{num_references} references")
    return tuple(
        f"prompt: mentions {found[number]!r}, and {given} {'are' if num_references > 1 else 'is'} given; give image "
        f"{number}, or change the prompt"
        for number in sorted(found)
        if num_references < number <= _MOST
    )
