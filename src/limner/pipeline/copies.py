"""Copies of a pipeline: `copy.deepcopy`, and pickles for other processes.

A copy has weights of its own. In one process it shares the store, since References are values; in another one it has a new
store of the default budgets. Knows nothing of calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from limner.errors import InvalidRequest
from limner.model.text_encoder import TextEncoder
from limner.weights.live import restore_text_encoder

__all__ = ["deep_copy", "reduce_pipeline"]

_FEWEST_LAYERS = 4
"""Of a text encoder's configuration; how many there are, `used` says."""
_PARTS = ("transformer", "autoencoder")
_SETTINGS = ("schedule", "default_size", "sizes", "reference_policy", "kv_cache_dtype", "kind", "latent_preview")


def deep_copy(self: Any, memo: dict[int, Any]) -> Any:
    """Return a pipeline with copies of the weights and the same store. Raises `InvalidRequest` as `reduce_pipeline`."""
    build, (kind, parts) = reduce_pipeline(self)
    made = build(kind, {**copy.deepcopy(parts, memo), "store": self.store})
    memo[id(self)] = made
    return made


def reduce_pipeline(self: Any) -> tuple[Callable[..., Any], tuple[type[Any], dict[str, Any]]]:
    """Return what a pickle holds: networks and settings. The memory limit is left out: weights of a copy are of no file.

    Raises `InvalidRequest` for a model that is divided among processes or has LoRAs.
    """
    if self.parallel is not None:
        raise InvalidRequest("copy", "a parallel model belongs to its processes; load it where it is needed")
    if names := self.networks.adapters.names or list(self.fused_loras):
        raise InvalidRequest("copy", f"LoRAs {names} are loaded; unload_lora_weights() (and unfuse_lora()) first")
    return _build, (
        type(self),
        {name: getattr(self, name) for name in (*_PARTS, *_SETTINGS)} | {"text_encoder": _plain(self.text_encoder)},
    )


def _plain(encoder: TextEncoder) -> dict[str, Any]:
    """Return a text encoder without what transformers hooks to its layers at the first call, which no pickle holds."""
    network = encoder.network
    used = len(network.layers)
    depth = used + isinstance(network.norm, nn.Identity)  # its final norm is there if all layers are
    config = network.config.to_dict()
    return {
        "tensors": dict(network.state_dict()),
        "tokenizer": encoder.tokenizer,
        "config": config | {"num_hidden_layers": max(depth, _FEWEST_LAYERS)},
        "used": used,
        "depth": depth,
        "out_layers": encoder.out_layers,
        "known": encoder.known,
    }


def _build(kind: type[Any], parts: dict[str, Any]) -> Any:
    values = dict(parts["text_encoder"])
    known = values.pop("known")
    encoder = restore_text_encoder(**values)
    encoder.known = known
    return kind(**{**parts, "text_encoder": encoder})
