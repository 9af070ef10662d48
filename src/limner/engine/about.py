"""What people may read of a model: its card, and the words that it knows. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from limner.errors import CheckpointError
from limner.models import published
from limner.options import ModelOptions
from limner.places import is_url
from limner.weights.folder import PARTS, read_settings, resolve_model

__all__ = ["ModelAbout", "about_model"]

_MAX_CARD = 200_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAbout:
    """`card` is Markdown, `url` where it stands on the hub; at most one is given.

    `words` are the only ones that the model was trained on; none: any.
    """

    card: str | None = None
    url: str | None = None
    words: tuple[str, ...] = ()


def about_model(options: ModelOptions) -> ModelAbout:
    """Read what is said of a model, where its folder is on this disk. What is not there, or broken, is left out."""
    given = options.model
    if given is not None and not Path(given).is_dir():
        if (known := published(given)) is not None:
            return ModelAbout(url=known.page)
        is_hub = not is_url(given) and given.count("/") == 1
        return ModelAbout(url=f"https://huggingface.co/{given}" if is_hub else None)
    try:
        folder = resolve_model(given, without=PARTS)
        settings = read_settings(folder)
    except CheckpointError:  # loading says so, in full
        return ModelAbout()
    try:
        card = (folder / "README.md").read_text("utf-8", errors="replace")[:_MAX_CARD]
    except OSError:
        card = None
    found = settings.known_words({"transformer": options.transformer, "text_encoder": options.text_encoder})
    return ModelAbout(card=card, words=tuple(sorted(found.words)))
