"""What a prompt mentions and there is not: pictures by number, as "image 2", and words that a model was not trained on.

Owns how prompts name references, and which words they have. Knows no pictures and no models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import groupby

from limner.config import KnownWords

__all__ = ["at_card", "missing_pictures", "prompt_warnings", "unknown_words"]

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
_SHOWN = 6
"""Unknown words that a warning names."""
_LONGEST = 40
"""Letters of a word that it shows."""
_CARD = "its card says what it understands"


def prompt_warnings(prompts: Iterable[str], *, num_references: int, known: KnownWords) -> tuple[str, ...]:
    """Return all that is to be said of the prompts of a call."""
    prompts = tuple(prompts)
    found = missing_pictures(prompts, num_references=num_references)
    unknown = unknown_words(prompts, known.words) if known.words else []
    if not unknown:
        return found
    shown = ", ".join(_shown(word, known.words) for word in unknown[:_SHOWN])
    more = len(unknown) - _SHOWN
    further = f" and {more} more word{'s' if more > 1 else ''}" if more > 0 else ""
    return (*found, at_card(f"prompt: the model was not trained on {shown}{further}; {_CARD}", known.card))


def unknown_words(prompts: Iterable[str], words: Collection[str]) -> list[str]:
    """Return the words of prompts that are not among those given, each once.

    A word is a run of letters of any script, and "Cat" is another one than "cat". The page's `words.js` has the same rule.
    """
    runs = ("".join(run) for text in prompts for letters, run in groupby(text, str.isalpha) if letters)
    return [word for word in dict.fromkeys(runs) if word not in words]


def _shown(word: str, known: frozenset[str]) -> str:
    small = word.lower()
    remedy = f" (write '{small}')" if small in known else ""
    return f"'{word if len(word) <= _LONGEST else f'{word[:_LONGEST]}...'}'{remedy}"


def at_card(warning: str, where: str) -> str:
    """Return a warning with the place of the model's card, where it speaks of it and does not say where that is."""
    return f"{warning}: {where}" if where and warning.endswith(_CARD) else warning


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
