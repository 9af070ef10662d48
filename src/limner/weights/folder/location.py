"""Find a model and its parts: a folder, a file, or a hub id, which is downloaded once."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path

from limner.errors import CheckpointError
from limner.models import PUBLISHED, published, similar
from limner.weights import layouts
from limner.weights.hub import Hub, downloading, is_hub_id, local_path

__all__ = ["PARTS", "bundled_model", "resolve_model", "resolve_part"]

PARTS = (*layouts.PARTS, "tokenizer", "scheduler")
"""The folders of a model in the diffusers layout."""
_PACKAGE = Path(__file__).parents[2]
_logger = logging.getLogger("limner")
_BUNDLED = "; the bundled model is none of them: leave the name out"
_OURS = re.compile("bundled|default|limner|sticker", re.IGNORECASE)
"""Names by which somebody asks for the bundled model, which has none."""


def bundled_model() -> Path:
    """Return the folder of the model that comes with the package."""
    return _PACKAGE / "assets" / "stickers"


def resolve_model(
    model: str | os.PathLike[str] | None, *, without: Collection[str] = (), hub: Hub | None = None
) -> Path:
    """Return the folder, in the diffusers layout, of a path, a hub id, or None (the bundled model).

    A hub id is downloaded once and later found in the cache, also without a network. Parts named in `without` come from
    elsewhere: the folder may lack them, and of a hub id only their configurations are downloaded. `hub` says how it is
    downloaded. Raises `CheckpointError`.
    """
    if model is None:
        return bundled_model()
    folder = _find(model, "model", without=without, hub=hub or Hub())
    if not folder.is_dir():
        raise CheckpointError(
            f"model: {folder} is a file; give the folder that holds model_index.json, and the file as transformer=, vae= "
            "or text_encoder="
        )
    missing = [name for name in ("model_index.json", *PARTS) if name not in without and not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"model: {folder} has no {', '.join(missing)}; give a folder in the diffusers layout")
    return folder


def resolve_part(part: str, given: str | os.PathLike[str] | None, *, model: Path, hub: Hub | None = None) -> Path:
    """Return the file or folder of a part: the model's own, or the one given.

    Given may be a file, a folder of the part or of a whole model, or the hub id of a whole model. Raises
    `CheckpointError`.
    """
    if given is None:
        return model / part
    others = (hub or Hub()).of_others()
    found = _find(given, part, without=[name for name in PARTS if name != part], hub=others)
    if found.is_dir() and not (found / "config.json").exists() and (found / part).is_dir():
        return found / part
    return found


def _find(given: str | os.PathLike[str], field: str, *, without: Collection[str], hub: Hub) -> Path:
    """Return the path on this disk of a path, a hub id, or a model's short name."""
    path, exists = local_path(given, field=field)
    if exists:
        if hub.revision is not None:
            _logger.info("revision=%r has no effect: %s is on this disk", hub.revision, path)
        return path
    text = os.fspath(given)
    if known := published(text):
        text = known.hub_id
    if not is_hub_id(text) or path.suffix in (".safetensors", ".gguf", ".sft"):
        meant = f"did you mean {near}? " if (near := similar(text)) else ""
        raise CheckpointError(
            f"{field}: {text} is neither a folder nor a hub id (owner/name); {meant}check the path, or give one of "
            f"{', '.join(PUBLISHED)}{_BUNDLED if _OURS.search(text) else ''}"
        )
    return _download(text, field, without=without, hub=hub)


def _download(hub_id: str, field: str, *, without: Collection[str], hub: Hub) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "limner.json", *(f"{name}/*" for name in PARTS if name not in without)]
    patterns += [f"{name}/config.json" for name in without]
    with downloading(hub_id, field=field, instead="a folder"):
        return Path(snapshot_download(hub_id, allow_patterns=patterns, **hub.arguments()))
