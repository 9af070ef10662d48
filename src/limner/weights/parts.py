"""The parts of a model: which one a file or folder holds, and opening it in whatever layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from limner.config import TransformerConfig
from limner.errors import CheckpointError, InvalidRequest
from limner.weights.checkpoint import Checkpoint
from limner.weights.configuration import KINDS, configuration_of
from limner.weights.files import open_folder, read_json, variants_of
from limner.weights.layouts import layout_of, naming_of, open_file, parts_of, recognise
from limner.weights.networks import QUANT_METHOD

__all__ = ["STEMS", "Progress", "check_variant", "is_model_folder", "open_part", "part_of", "says_int8"]

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Names of the files of weights in a part's folder, without suffix."""
Progress = Callable[[str, int, int], None]
"""Called with a part, the number of its tensors that are done, and the number of all."""


def is_model_folder(source: Path) -> bool:
    """Return True for the folder of a whole model in the diffusers layout."""
    return source.is_dir() and (source / "model_index.json").is_file()


def part_of(source: Path, *, part: str | None = None) -> str | None:
    """Return the part that a file or folder holds, `part` if given; None for the folder of a whole model.

    Raises `CheckpointError`.
    """
    if is_model_folder(source):
        return part
    if source.is_dir():
        config = read_json(source / "config.json")
        kinds = {value: name for name, (_, value) in KINDS.items()}
        found = part or kinds.get(str(config.get("_class_name", config.get("model_type"))))
        if found is None:
            kind = config.get("_class_name") or config.get("model_type")
            raise CheckpointError(f"{source}: config.json is of {kind!r}; allowed: {', '.join(kinds)}")
        return found
    if part is not None:
        return part
    parts = parts_of(open_file(source))
    if len(parts) > 1:
        raise CheckpointError(f"{source}: holds {', '.join(parts)}; say which one (--part)")
    return parts[0] if parts else "transformer"  # `recognise` then says what is wrong with the file


def open_part(part: str, source: Path, *, like: Path | None = None, variant: str | None = None) -> Checkpoint:
    """Open a part from its folder (config.json and weights), or from a single file of any layout.

    `like` is a config.json of the same geometry: `configuration_of` says what it is for. `variant` is that of a folder's
    weights, as "fp16". Raises `CheckpointError`.
    """
    if source.is_dir():
        return _open_folder(part, source, variant)
    file = open_file(source)
    layout = recognise(file, part)
    return Checkpoint(file, layout, configuration_of(file, layout, like=like), where=source)


def check_variant(variant: str | None, sources: Mapping[str, Path]) -> None:
    """Raise `InvalidRequest` for a variant that no folder of these parts has; parts without it are read as they are."""
    if variant is None:
        return
    found = {name for part, source in sources.items() if source.is_dir() for name in variants_of(source, STEMS[part])}
    if variant not in found:
        allowed = ", ".join(sorted(found)) or "none: no folder has variants, leave it out"
        raise InvalidRequest("variant", f"{variant!r} is not one of the model's variants; allowed: {allowed}")


def _open_folder(part: str, source: Path, variant: str | None) -> Checkpoint:
    config = read_json(source / "config.json")
    if part == "transformer":
        TransformerConfig.from_diffusers(config, where=str(source / "config.json"))
    # transformers reads a single file before shards, diffusers the shards
    file = open_folder(source, STEMS[part], variant=variant, shards_first=part != "text_encoder")
    naming, prefix = naming_of(file, part) or ("diffusers", "")
    if part == "transformer" and "quantization_config" in config:
        _check_method(config["quantization_config"], where=source / "config.json")
    layout = layout_of(file, part, naming=naming, prefix=prefix)
    if says_int8(config) and layout.quantization != "int8":
        raise CheckpointError(f"{source}: config.json says int8, the weights are not; quantize the model again")
    return Checkpoint(file, layout, config, where=source)


def says_int8(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says that the weights are Limner's int8. Those of text encoders may name other methods."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def _check_method(found: Any, *, where: Path) -> None:
    method = found.get("quant_method") if isinstance(found, dict) else found
    if found is not None and method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quantization {method!r} is not supported; allowed: {QUANT_METHOD!r} or none")
