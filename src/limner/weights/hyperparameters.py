"""What the header of a GGUF file says of a text encoder, in the words of transformers' configuration. Reads no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limner.errors import CheckpointError
from limner.weights.gguf import GgufFile

__all__ = ["text_hyperparameters"]

_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
"""Keys of the header, without the architecture, and of the configuration."""
_FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
_AS_QWEN3 = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
}
"""What changes the arithmetic in ways that a Qwen3 has not, and the values that change nothing."""


def text_hyperparameters(file: GgufFile) -> dict[str, Any]:
    """Return the configuration that the header gives: nothing that it leaves out.

    Rotary embedding is given whole (`rope_parameters`) or not at all. Raises `CheckpointError` for what is not read.
    """
    prefix = f"{file.architecture}."
    said = {name.removeprefix(prefix): value for name, value in file.hyperparameters.items() if name.startswith(prefix)}
    for key, kept in _AS_QWEN3.items():
        if key in said and said[key] not in kept:
            raise _unread(file, prefix + key, said[key], allowed=" or ".join(map(repr, kept)))
    for key, other in (
        ("attention.value_length", "attention.key_length"),
        ("rope.dimension_count", "attention.key_length"),
    ):
        if key in said and other in said and said[key] != said[other]:
            raise _unread(file, prefix + key, said[key], allowed=f"{said[other]}, which is {prefix}{other}")
    found: dict[str, Any] = {}
    for key, name in _KEYS.items():
        if key in said:
            number = _number(file, prefix + key, said[key])
            if key not in _FLOATS and number != int(number):
                raise _unread(file, prefix + key, said[key], allowed="a whole number")
            found[name] = number if key in _FLOATS else int(number)
    if "rope.freq_base" in said:
        found["rope_parameters"] = _rope(file, prefix, said)
    elif any(key.startswith("rope.scaling.") for key in said):
        raise _unread(file, f"{prefix}rope.freq_base", None, allowed="a number, where rope.scaling is given")
    return found


def _rope(file: GgufFile, prefix: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters`: base, and stretching of positions (linear or YaRN) if there is any."""
    theta = _number(file, f"{prefix}rope.freq_base", said["rope.freq_base"])
    kind, factor = said.get("rope.scaling.type", "none"), said.get("rope.scaling.factor")
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise _unread(file, f"{prefix}rope.scaling.type", kind, allowed="'none', 'linear', 'yarn'")
    found = {"rope_type": kind, "rope_theta": theta, "factor": _number(file, f"{prefix}rope.scaling.factor", factor)}
    if kind == "yarn":
        length = said.get("rope.scaling.original_context_length")
        found["original_max_position_embeddings"] = int(
            _number(file, f"{prefix}rope.scaling.original_context_length", length)
        )
    return found


def _number(file: GgufFile, key: str, value: Any) -> float:
    """Return a positive number; float32 has seven digits, so 1e-6 is 1e-6 and not 9.99999997e-07."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise _unread(file, key, value, allowed="a number over 0")
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _unread(file: GgufFile, key: str, value: Any, *, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: {key}={value!r} in its header is not read; allowed: {allowed}; take another file of these weights"
    )
