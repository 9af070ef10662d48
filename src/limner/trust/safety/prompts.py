"""The check of prompts: lists of terms for the worst kinds, and an operator's own terms."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from limner.errors import InvalidRequest
from limner.trust.safety.check import Finding, Role, check_tolerance

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PromptCheck"]

# Words that name people under age, and words that make a prompt sexual: refused where both occur.
_MINORS = (
    "adolescent",
    "adolescents",
    "baby",
    "babies",
    "child",
    "children",
    "infant",
    "infants",
    "kid",
    "kids",
    "little boy",
    "little boys",
    "little girl",
    "little girls",
    "a minor",
    "minors",
    "preschooler",
    "preteen",
    "preteens",
    "pre teen",
    "schoolboy",
    "schoolboys",
    "schoolgirl",
    "schoolgirls",
    "teen",
    "teens",
    "teenage",
    "teenager",
    "teenagers",
    "toddler",
    "toddlers",
    "under age",
    "underage",
    "young boy",
    "young boys",
    "young girl",
    "young girls",
)
_SEXUAL = (
    "erotic",
    "erotica",
    "genitals",
    "hentai",
    "intercourse",
    "lingerie",
    "masturbating",
    "naked",
    "nsfw",
    "nude",
    "nudes",
    "nudity",
    "orgasm",
    "porn",
    "porno",
    "pornographic",
    "pornography",
    "seductive",
    "sex",
    "sexual",
    "sexualised",
    "sexualized",
    "sexually",
    "sexy",
    "topless",
    "undressed",
    "xxx",
)
_AGE = r"(?:[0-9]|1[0-7])[\W_]*(?:(?:years?|yrs?)[\W_]*old|yo)"
# Terms that need no second word.
_ABUSE = ("child porn", "child pornography", "csam", "jailbait", "kiddie porn", "loli", "lolicon", "shota", "shotacon")
_INTIMATE = (
    "creepshot",
    "deepfake nude",
    "deepfake nudes",
    "deepfake porn",
    "deepnude",
    "fake nude",
    "fake nudes",
    "nudify",
    "revenge porn",
    "upskirt",
)
_SOMEBODY = "(?:girl|woman|man|boy|person|lady|guy)(?: s)?"
_PERSON = f"(?:her|him|them|his|their|(?:the|this) {_SOMEBODY})"
_REMOVE = "(?:remove|take off|strip off|delete|erase)"
_CLOTHES = "(?:clothes|clothing|underwear)"
_UNDRESSING = (
    f"undress {_PERSON}",
    f"{_REMOVE} (?:all )?(?:of )?{_PERSON} (?:{_CLOTHES}|dress|bikini|bra|outfit|shirt|top)",
    f"{_REMOVE} (?:the )?{_CLOTHES} (?:from|of|off) {_PERSON}",
    f"(?:take|strip) {_PERSON} clothes off",
    f"(?:make|turn|show|render) {_PERSON} (?:naked|nude|topless)",
    f"{_PERSON} without (?:any )?{_CLOTHES}",
)

_REASONS = {
    "minors": "The prompt seems to ask for sexual content that involves minors, which is never made.",
    "intimate": "The prompt seems to ask for intimate pictures of a person without consent, which are never made.",
    "operator": "The prompt has a term that the operator of this service does not allow.",
}
# Scripts that put no spaces between words: a term in one is also found inside a run of letters.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def _normal(text: str) -> str:
    """Return a text for comparison: NFKC, case folded, without invisible characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())


def _pattern(alternatives: Iterable[str]) -> re.Pattern[str]:
    """Match any of the alternatives as whole words; a space in one matches anything between two words."""
    parts = "|".join(text.replace(" ", r"[\W_]+") for text in alternatives)
    return re.compile(rf"(?<![^\W_])(?:{parts})(?![^\W_])")


def _term(text: str) -> str:
    """Return an operator's term as a regular expression with its own word boundaries; '' if it has no letters."""
    words = re.findall(r"[^\W_]+", _normal(text))
    if not words:
        return ""
    before, after = (
        "" if unicodedata.name(char, "").startswith(_UNSPACED) else ends
        for char, ends in ((words[0][0], r"(?<![^\W_])"), (words[-1][-1], r"(?![^\W_])"))
    )
    return before + r"[\W_]+".join(re.escape(word) for word in words) + after


class PromptCheck:
    """A short list of terms for the worst kinds of prompt, at every `safety_tolerance`; pictures pass.

    Two kinds: sexual content that involves minors (a word for a minor, or an age under 18, together with a sexual one,
    or a term that says both) and intimate pictures of people without their consent (undressing the person in a
    picture). Words are compared whole, without regard to case, width or invisible characters.

    Limits: the lists are English. Other spellings, separated letters, slang, other languages and what is only implied
    pass. A harmless sentence with both kinds of word (a poster on sex education for children) is refused. Only the plain
    case is caught; the pictures are checked as well.

    `terms` are an operator's own, in any language; each may have several words.
    """

    name = "prompt"

    def __init__(self, *, terms: Iterable[str] = ()) -> None:
        self._abuse, self._sexual = _pattern(_ABUSE), _pattern(_SEXUAL)
        self._minors = _pattern((*_MINORS, _AGE))
        self._intimate = _pattern((*_INTIMATE, *_UNDRESSING))
        own = []
        for number, text in enumerate(terms, start=1):
            own.append(_term(text))
            if not own[-1]:
                raise InvalidRequest("terms", f"term {number} ({text!r}) has no letters or digits; give a word")
        self._own = re.compile("|".join(own)) if own else None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> PromptCheck:
        """Read the terms from a UTF-8 file, one a line; empty lines and lines that begin with # are skipped."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InvalidRequest("terms", f"{path} cannot be read ({error.strerror}); give a text file") from error
        except ValueError as error:
            raise InvalidRequest("terms", f"{path} is not UTF-8 text ({error}); save it so") from error
        numbered = [
            (number, line) for number, line in enumerate(lines, start=1) if line.strip() and line.lstrip()[0] != "#"
        ]
        for number, line in numbered:
            if not _term(line):
                raise InvalidRequest("terms", f"{path}, line {number}: {line!r} has no letters or digits; give a word")
        return cls(terms=[line for _, line in numbered])

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Refuse by the lists, at every tolerance."""
        check_tolerance(tolerance)
        text = _normal(prompt)
        category = None
        if self._abuse.search(text) or (self._sexual.search(text) and self._minors.search(text)):
            category = "minors"
        elif self._intimate.search(text):
            category = "intimate"
        elif self._own is not None and self._own.search(text):
            category = "operator"
        return None if category is None else Finding(check=self.name, category=category, reason=_REASONS[category])

    def check_image(self, image: Image.Image, *, role: Role, tolerance: int) -> Finding | None:
        """Pass every picture; pictures are for `NsfwImageCheck`."""
        check_tolerance(tolerance)
        return None
