"""What the configurations of a model folder may say: nothing that names code to run, and no size that no network has.

Checked before anything is built, since a number alone makes a constructor run for hours. Reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from limner.config import TransformerConfig
from limner.errors import CheckpointError

__all__ = ["MAX_LAYERS", "MAX_LEVELS", "check_autoencoder", "check_json", "check_text_encoder", "check_transformer"]

MAX_LAYERS = 512
"""Layers or blocks of a network; klein-9b has 36."""
_MAX_DEPTH = 32
"""Objects and lists inside each other in a JSON file."""
_MAX_WIDTH = 1 << 17
"""Channels of a layer; klein-9b's widest has 36,864."""
_MAX_VOCABULARY = 1 << 22
_MAX_HEADS = _MAX_HEAD_DIM = 1024
MAX_LEVELS = 8
"""Resolutions of an autoencoder; FLUX.2's has four."""
_MAX_RESNETS = 16
_MAX_NUMBER = 1 << 31
"""Whole numbers whose meaning is not known here: positions, ids of tokens, labels."""
_MAX_LABELS = 4096
"""Transformers makes two dictionaries of so many entries."""
_CODE = re.compile(
    r"auto_map|custom_pipelines?|trust_remote_code|remote_code|code_revision|use_kernels|kernel_config|kernel_mapping"
    r"|hub_kernels?|allow_all_kernels|_compatible_flash_implementations"
)
"""Keys by which a library finds code in the folder or on the hub."""
_IMPLEMENTATION = re.compile(r"_?(?:attn|attention|experts)_implementation(?:_internal)?")
_BUILT_IN = (None, "eager", "sdpa")
"""Implementations that are part of the installed library. Other names may be those of a repository with kernels."""
_LIBRARIES = ("diffusers", "transformers", "torch", "flux2")
"""Where networks come from that LoRAs are trained on; flux2 is the original program's package. Nothing of them is run."""


def check_json(value: object, *, where: object) -> None:
    """Raise `CheckpointError` for JSON that is nested too deeply, or has a key that names code to run."""
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{where}: is nested more than {_MAX_DEPTH} levels deep; download it again")
        for one in level:
            if isinstance(one, dict):
                for key, inner in one.items():
                    _check_key(key, inner, where=where)
        level, depth = [inner for one in level for inner in _inside(one)], depth + 1


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _check_key(key: str, value: object, *, where: object) -> None:
    if _CODE.fullmatch(key):
        is_code = value not in (None, False, {}, [])
    elif _IMPLEMENTATION.fullmatch(key):
        is_code = value not in _BUILT_IN if isinstance(value, (str, type(None))) else True
    elif key == "auto_mapping":  # of PEFT: the module of the class that the LoRA was trained on
        library = value.get("parent_library") if isinstance(value, dict) else value
        is_code = library is not None and str(library).partition(".")[0] not in _LIBRARIES
    else:
        return
    if is_code:
        raise CheckpointError(
            f"{where}: {key}={_short(value)} names code to run, and code of a model is never run; use a model without it, "
            "or remove the key if the model does not need it"
        )


def check_transformer(config: TransformerConfig, *, where: object) -> None:
    """Raise `CheckpointError` for sizes that no transformer of the family has."""
    for name, high in (
        ("num_double_blocks", MAX_LAYERS),
        ("num_single_blocks", MAX_LAYERS),
        ("num_heads", _MAX_HEADS),
        ("head_dim", _MAX_HEAD_DIM),
        ("width", _MAX_WIDTH),
        ("text_width", _MAX_WIDTH),
        ("in_channels", _MAX_WIDTH),
        ("out_channels", _MAX_WIDTH),
        ("time_channels", _MAX_WIDTH),
    ):
        _check_range(name, getattr(config, name), low=1, high=high, where=where)
    for axis in config.rope_axes:
        _check_range("axes_dims_rope", axis, low=0, high=_MAX_HEAD_DIM, where=where)
    _check_range("mlp_ratio", config.mlp_ratio, low=1 / 64, high=64, where=where)
    _check_range("rope_theta", config.rope_theta, low=1, high=1e12, where=where)
    _check_range("eps", config.eps, low=0, high=1, where=where)


def check_autoencoder(config: Mapping[str, Any], *, where: object) -> None:
    """Raise `CheckpointError` for sizes that no autoencoder of the family has."""
    for key, value in config.items():
        if key.startswith("_"):  # notes of diffusers, such as which values are its defaults
            continue
        if isinstance(value, (list, tuple)) and len(value) > MAX_LEVELS:
            raise CheckpointError(
                f"{where}: {key} has {len(value)} entries; at most {MAX_LEVELS} are allowed, one for each resolution"
            )
        high = _MAX_RESNETS if key == "layers_per_block" else _MAX_WIDTH
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, int):
                _check_range(key, one, low=0, high=high, where=where)


def check_text_encoder(config: Mapping[str, Any], *, where: object) -> None:
    """Raise `CheckpointError` for sizes that no Qwen3 has."""
    limits = {
        "num_hidden_layers": MAX_LAYERS,
        "num_attention_heads": _MAX_HEADS,
        "num_key_value_heads": _MAX_HEADS,
        "head_dim": _MAX_HEAD_DIM,
        "hidden_size": _MAX_WIDTH,
        "intermediate_size": _MAX_WIDTH,
        "vocab_size": _MAX_VOCABULARY,
        "num_labels": _MAX_LABELS,
    }
    for key, value in config.items():
        if isinstance(value, int):
            low, high = (1, limits[key]) if key in limits else (-_MAX_NUMBER, _MAX_NUMBER)
            _check_range(key, value, low=low, high=high, where=where)


def _check_range(name: str, value: float, *, low: float, high: float, where: object) -> None:
    if not low <= value <= high:  # also for NaN
        raise CheckpointError(
            f"{where}: {name}={_short(value)} is not a size of such a network; allowed: {low} to {high}; download it again"
        )


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
