"""The published models of the family by short names: where they are, what they are, and under which licence.

Knows no files and downloads nothing.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from limner.config import MODELS, ModelGeometry
from limner.kinds import ISOLATED, ModelKind
from limner.memory.components import download_bytes

__all__ = ["PUBLISHED", "PublishedModel", "published", "similar"]

_OWNER = "black-forest-labs"
_APACHE, _NON_COMMERCIAL = "Apache-2.0", "FLUX Non-Commercial License"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """One model. `hub_id` is its repository on the Hugging Face hub, `geometry` that of its networks."""

    hub_id: str
    geometry: ModelGeometry
    kind: ModelKind
    licence: str

    @property
    def page(self) -> str:
        """The page of the model, where its licence is accepted."""
        return f"https://huggingface.co/{self.hub_id}"

    @property
    def download(self) -> int:
        """About how many bytes are downloaded: those of all of its weights in bfloat16, by its geometry."""
        return download_bytes(self.geometry)


_JOINT = ModelKind(references="joint", distilled=True)
_BASE = ModelKind(references="joint", distilled=False)

PUBLISHED = {
    short: PublishedModel(hub_id=f"{_OWNER}/{name}", geometry=MODELS[geometry], kind=kind, licence=licence)
    for short, name, geometry, kind, licence in (
        ("klein-9b-kv", "FLUX.2-klein-9b-kv", "klein-9b", ISOLATED, _NON_COMMERCIAL),
        ("klein-9b", "FLUX.2-klein-9B", "klein-9b", _JOINT, _NON_COMMERCIAL),
        ("klein-4b", "FLUX.2-klein-4B", "klein-4b", _JOINT, _APACHE),
        ("klein-base-9b", "FLUX.2-klein-base-9B", "klein-9b", _BASE, _NON_COMMERCIAL),
        ("klein-base-4b", "FLUX.2-klein-base-4B", "klein-4b", _BASE, _APACHE),
    )
}
"""Short names that `model` may be, everywhere. A folder of that name comes first."""


def published(name: str) -> PublishedModel | None:
    """Return the model of a short name, or of its repository's name as it is written elsewhere; None if there is none.

    Case, the order of words and what is between them do not count: "FLUX.2-klein-4B", "flux2-klein-4b", "klein-4b-base".
    """
    owner, slash, rest = name.rpartition("/")
    if slash and owner.lower() != _OWNER:
        return None
    return _BY_WORDS.get(_words(rest))


def similar(name: str) -> str | None:
    """Return the short name that is spelled most like a name, or the last part of a path; None if none is near."""
    words = re.sub(r"^flux\W?2\W*", "", name.replace("\\", "/").rpartition("/")[2].lower())
    return next(iter(difflib.get_close_matches(words, PUBLISHED, n=1, cutoff=0.8)), None)


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", re.sub(r"^flux\W?2", "", name.lower())))


_BY_WORDS = {_words(short): model for short, model in PUBLISHED.items()}
