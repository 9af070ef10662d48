"""The kind of a model (`limner.kinds`): what its files say, and what follows from who asks.

Sources, the first that says something: the header of a transformer's file from elsewhere, or the `model_index.json` beside
a transformer's folder from elsewhere; `limner.json`; `model_index.json`. Names of files are hints, for a warning only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from limner.errors import CheckpointError, InvalidRequest
from limner.kinds import DIFFUSERS_KINDS, ISOLATED, ModelKind, ReferencesAttention, check_attention, hinted_kind
from limner.weights.files import read_json
from limner.weights.gguf import GgufFile
from limner.weights.layouts import open_file

__all__ = [
    "DEFAULT",
    "HEADER_KEY",
    "FoundKind",
    "chosen_kind",
    "find_kind",
    "kind_of_index",
    "kind_of_transformer",
    "to_header",
]

_logger = logging.getLogger("limner")
HEADER_KEY = "limner.kind"
"""Where a safetensors header that `limner convert` wrote says the kind, as "joint distilled"."""
_HEADER_NAMES = ("modelspec.architecture", "modelspec.title", "general.name", "general.basename", "general.finetune")
"""Where safetensors (modelspec) and GGUF headers say what a model is called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundKind:
    """What files say of a model's kind, and which of them; `stated` False: nothing does, and `kind` is the default.

    `says_distilled` is True where `is_distilled` stands in the file, and was not filled in with diffusers' default.
    `name` is that of a transformer's file that says nothing itself.
    """

    kind: ModelKind
    source: str
    stated: bool = True
    says_distilled: bool = True
    name: str | None = None


DEFAULT = FoundKind(kind=ISOLATED, source="default", stated=False)
"""The kind of networks that come without files."""


def find_kind(folder: Path, *, transformer: Path | None = None) -> FoundKind:
    """Return what a model's folder, and a transformer from elsewhere if there is one, say. Raises `CheckpointError`."""
    of_folder = _of_folder(folder)
    if transformer is None or transformer == folder / "transformer":
        return of_folder
    found = kind_of_transformer(transformer)
    if found is None:
        return replace(of_folder, stated=False, name=transformer.name)
    return found


def chosen_kind(
    found: FoundKind, *, given: ReferencesAttention | str | None = None, called: str | None = None
) -> ModelKind:
    """Return the kind that a pipeline draws with, and say in the log what decided it. Raises `InvalidRequest`.

    `given` is the caller's word, `called` the name of the diffusers class that was called: each is followed, as the class
    is in diffusers, with a warning where the files say otherwise.
    """
    asked = check_attention(given)
    kind, by = found.kind, "given"
    if called is not None:
        of_class = DIFFUSERS_KINDS[called]
        if not found.says_distilled or not found.stated:
            kind = replace(kind, distilled=of_class.distilled)
        if asked is None:
            asked, by = of_class.references, f"of {called}"
    if asked is not None and asked != kind.references:
        if found.stated:
            _logger.warning(
                "references: %s says %s, %s (%s) is drawn: not what these weights were trained for; limner.Pipeline "
                "without references= draws as %s says",
                found.source,
                kind.references,
                asked,
                by,
                found.source,
            )
        kind = kind.with_references(asked)
    hinted = hinted_kind(found.name) if found.name is not None else None
    if hinted is not None and hinted != kind:
        _logger.warning(
            "%s is named as one of %s, and nothing in it says so; it is drawn with %s. If the name is right, write "
            '{"references": "%s", "is_distilled": %s} into limner.json in the model\'s folder',
            found.name,
            hinted,
            kind,
            hinted.references,
            str(hinted.distilled).lower(),
        )
    if not found.stated:
        _logger.info(
            "model kind: nothing in the files says it; drawn with %s (%s)", kind, by if asked else found.source
        )
    else:
        _logger.info("model kind: %s (%s)", kind, by if asked else found.source)
    return kind


def kind_of_index(index: Mapping[str, Any], *, where: str) -> FoundKind:
    """Return the kind that a `model_index.json` names, with diffusers' defaults. Raises `CheckpointError`."""
    name = str(index.get("_class_name"))
    if name not in DIFFUSERS_KINDS:
        raise CheckpointError(f"{where}: model_index.json is of a {name}; allowed: {', '.join(DIFFUSERS_KINDS)}")
    kind = DIFFUSERS_KINDS[name]
    distilled = index.get("is_distilled")
    if distilled is not None and not isinstance(distilled, bool):
        raise CheckpointError(f"{where}: is_distilled={distilled!r} has to be true or false")
    return FoundKind(
        kind=kind if distilled is None else replace(kind, distilled=distilled),
        source="model_index.json",
        says_distilled=distilled is not None,
    )


def _of_folder(folder: Path) -> FoundKind:
    found = kind_of_index(read_json(folder / "model_index.json"), where=str(folder))
    file = folder / "limner.json"
    own = read_json(file) if os.path.lexists(file) else {}
    kind, says = found.kind, False
    if (attention := own.get("references")) is not None:
        try:
            kind, says = kind.with_references(check_attention(attention)), True
        except InvalidRequest as error:
            raise CheckpointError(f"{file}: {error}") from error
    if (distilled := own.get("is_distilled")) is not None:
        if not isinstance(distilled, bool):
            raise CheckpointError(f"{file}: is_distilled={distilled!r} has to be true or false")
        kind, says = replace(kind, distilled=distilled), True
    if not says:
        return found
    return FoundKind(
        kind=kind, source="limner.json", says_distilled=found.says_distilled or own.get("is_distilled") is not None
    )


def kind_of_transformer(source: Path) -> FoundKind | None:
    """Return what a transformer's file or folder says of itself; None: nothing. Raises `CheckpointError`."""
    if source.is_dir():
        for folder in (source, source.parent):
            if (folder / "model_index.json").is_file():
                return _of_folder(folder)
        return None
    file = open_file(source)
    metadata = file.hyperparameters if isinstance(file, GgufFile) else file.metadata
    if HEADER_KEY in metadata:
        return _of_header(metadata[HEADER_KEY], where=source)
    for name in _HEADER_NAMES:
        kind = hinted_kind(str(metadata.get(name, "")))
        if kind is not None:
            return FoundKind(kind=kind, source=f"{name} in the header of {source.name}")
    return None


def to_header(kind: ModelKind) -> str:
    """Return the kind as the header of a file says it."""
    return f"{kind.references} {'distilled' if kind.distilled else 'base'}"


def _of_header(text: str, *, where: Path) -> FoundKind:
    kinds = {
        to_header(ModelKind(references=r, distilled=d)): (r, d)
        for r in get_args(ReferencesAttention)
        for d in (True, False)
    }
    if text not in kinds:
        raise CheckpointError(f"{where}: {HEADER_KEY}={text[:40]!r} in its header is not one of {', '.join(kinds)}")
    references, distilled = kinds[text]
    return FoundKind(
        kind=ModelKind(references=references, distilled=distilled), source=f"{HEADER_KEY} in the header of {where.name}"
    )
