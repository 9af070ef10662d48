"""The settings of a model's folder: `model_index.json` is checked, `limner.json` is read if it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limner.config import KnownWords
from limner.errors import CheckpointError
from limner.grid import MIN_SIDE, PIXELS
from limner.model.preview import LatentPreview
from limner.weights.files import read_json
from limner.weights.folder.kind import DEFAULT, FoundKind, find_kind

__all__ = ["FolderSettings", "read_settings"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSettings:
    """What a folder says besides its parts. Sizes are (width, height).

    `sizes` are those that the model draws (none: any). `max_reference_pixels` caps references, `preview` maps latents to
    pixels. `kind` is what the folder says of what the model was trained for. `words` are the only ones of its
    prompts; none: any.
    """

    default_size: tuple[int, int] = (1024, 1024)
    sizes: tuple[tuple[int, int], ...] = ()
    default_dtype: torch.dtype | None = None
    preview: LatentPreview | None = None
    max_reference_pixels: int | None = None
    kind: FoundKind = DEFAULT
    words: tuple[str, ...] = ()
    card: str = ""
    """The model's README.md, if it is there."""

    def known_words(self, replaced: Mapping[str, object]) -> KnownWords:
        """Return the words that the model knows, unless a part that learned them is `replaced` (None: it is not)."""
        if any(replaced.get(part) is not None for part in ("transformer", "text_encoder")):
            return KnownWords()
        return KnownWords(frozenset(self.words), self.card)


def read_settings(folder: Path) -> FolderSettings:
    """Check `model_index.json` and read `limner.json`. Raises `CheckpointError`."""
    kind = find_kind(folder)  # refuses the folder of a model of another family
    file = folder / "limner.json"
    own = read_json(file) if os.path.lexists(file) else {}
    default_size, sizes = _read_sizes(own, file)
    dtype = own.get("default_dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise CheckpointError(f"{file}: default_dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    pixels = own.get("max_reference_pixels")
    if pixels is not None and not (isinstance(pixels, int) and pixels >= PIXELS**2):
        raise CheckpointError(f"{file}: max_reference_pixels={pixels!r} has to be a number of at least {PIXELS**2}")
    preview = None
    if (values := own.get("latent_preview")) is not None:
        try:
            preview = LatentPreview(values["weight"], values["bias"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: latent_preview is not a map of latents to pixels ({error})") from error
    return FolderSettings(
        default_size=default_size,
        sizes=sizes,
        default_dtype=None if dtype is None else _DTYPES[dtype],
        preview=preview,
        max_reference_pixels=pixels,
        kind=kind,
        words=_read_words(own, file),
        card=str(card) if (card := folder / "README.md").is_file() else "",
    )


def _read_words(own: dict[str, Any], file: Path) -> tuple[str, ...]:
    words = own.get("words", [])
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise CheckpointError(f"{file}: words={str(words)[:100]} has to be a list of the words of prompts")
    return tuple(words)


def _read_sizes(own: dict[str, Any], file: Path) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Return the default size and all sizes."""
    allowed = f"[width, height], multiples of {PIXELS} of at least {MIN_SIDE}"
    sizes = own.get("sizes", [])
    if not (isinstance(sizes, list) and all(_is_size(one) for one in sizes)):
        raise CheckpointError(f"{file}: sizes={sizes!r} has to be a list of {allowed}")
    size: Any = own.get("default_size", sizes[0] if sizes else [1024, 1024])
    if not _is_size(size):
        raise CheckpointError(f"{file}: default_size={size!r} has to be {allowed}")
    if sizes and size not in sizes:
        raise CheckpointError(f"{file}: default_size={size!r} has to be one of sizes={sizes!r}")
    return (size[0], size[1]), tuple((w, h) for w, h in sizes)


def _is_size(value: Any) -> bool:
    """Return True if a value of JSON is [width, height] of a picture."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(side, int) and side >= MIN_SIDE and side % PIXELS == 0 for side in value)
    )
