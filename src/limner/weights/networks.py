"""Empty networks: built on the meta device, without memory, from the configuration of a checkpoint. Reads no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limner.config import TransformerConfig
from limner.errors import CheckpointError, first_line
from limner.model import autoencoder_network, qwen3
from limner.model.autoencoder_network import AutoencoderNetwork
from limner.model.int8 import quantize_blocks, quantize_layers
from limner.model.qwen3 import Qwen3
from limner.model.text_encoder import default_out_layers
from limner.model.transformer import Transformer
from limner.weights.bounds import MAX_LAYERS, check_autoencoder, check_text_encoder, check_transformer

__all__ = [
    "QUANT_METHOD",
    "diffusers_autoencoder",
    "empty_autoencoder",
    "empty_text_network",
    "empty_transformer",
    "text_layers",
    "text_unread",
]

QUANT_METHOD = "limner_int8"
"""`quantization_config.quant_method` of an int8 transformer or text encoder in its config.json."""


def empty_transformer(config: TransformerConfig, *, int8: bool, where: Path | str) -> Transformer:
    """Build the transformer; with `int8` its blocks have `Int8Linear`. Raises `CheckpointError`."""
    check_transformer(config, where=where)
    if config.out_channels != config.in_channels:
        raise CheckpointError(f"{where}: out_channels={config.out_channels} has to be in_channels={config.in_channels}")
    with torch.device("meta"):
        transformer = Transformer(config)
    if int8:
        quantize_blocks(transformer)
    return transformer


def empty_autoencoder(config: Mapping[str, Any], *, where: Path | str) -> Any:
    """Build the autoencoder: our network, or diffusers' for what that has besides. Raises `CheckpointError`."""
    check_autoencoder(config, where=where)

    def make() -> nn.Module:
        plain = autoencoder_network.is_plain(config)
        network: nn.Module = AutoencoderNetwork(config) if plain else diffusers_autoencoder(config)
        return network

    return _build(make, where=where)


def diffusers_autoencoder(config: Mapping[str, Any]) -> Any:
    """Build diffusers' autoencoder, with its errors."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_config(dict(config))


def text_layers(
    config: Mapping[str, Any], out_layers: tuple[int, ...] | None, *, where: Path | str
) -> tuple[int, tuple[int, ...]]:
    """Return the depth of a text encoder and the layers that are read. Raises `CheckpointError`."""
    if config.get("model_type") != "qwen3":
        raise CheckpointError(f"{where}: model_type={config.get('model_type')!r} is not supported; allowed: qwen3")
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or not 4 <= depth <= MAX_LAYERS:
        raise CheckpointError(
            f"{where}: num_hidden_layers={depth!r} has to be a whole number of at least 4, and at most {MAX_LAYERS}"
        )
    layers = out_layers or default_out_layers(depth)
    if not layers or max(layers) > depth or min(layers) < 0:
        raise CheckpointError(f"text_encoder_out_layers={list(layers)} has to name layers 0 to {depth} of {where}")
    return depth, layers


def empty_text_network(
    config: Mapping[str, Any], *, used: int, depth: int, where: Path | str, int8: bool = False
) -> Any:
    """Build a Qwen3 base model of the first `used` of `depth` layers, with its final norm only if that is all of them.

    It is our network, or transformers' for what that has besides; with `int8` its layers have `Int8Linear`. Raises
    `CheckpointError`, also for int8 matrices with a bias.
    """
    check_text_encoder(config, where=where)

    def make() -> nn.Module:
        values = dict(config) | {"num_hidden_layers": used, "layer_types": None}
        values.pop("quantization_config", None)  # of the file's weights, which are widened
        network: nn.Module = Qwen3(values) if qwen3.is_plain(values) else _transformers_network(values)
        if used < depth:  # hidden states are read before the norm, except those of the last layer
            network.norm = nn.Identity()
        return network

    made = _build(make, where=where)
    if int8:
        try:
            quantize_layers(made)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}; load this text encoder without quantize_text") from error
    return made


def _transformers_network(config: dict[str, Any]) -> Any:
    """Build transformers' Qwen3, with its errors."""
    from transformers import Qwen3Config, Qwen3Model

    if "max_window_layers" in config:
        config["max_window_layers"] = min(int(config["max_window_layers"]), config["num_hidden_layers"])
    return Qwen3Model(Qwen3Config.from_dict(config))


def text_unread(name: str, *, used: int, depth: int) -> bool:
    """Return True if no hidden state up to layer `used` depends on a tensor; its name has no "model." in front."""
    kind, _, rest = name.partition(".")
    if kind == "layers":
        number = rest.partition(".")[0]
        return number.isdecimal() and int(number) >= used
    return name == "lm_head.weight" or (name == "norm.weight" and used < depth)


def _build(make: Callable[[], Any], *, where: Path | str) -> Any:
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # constructors of other libraries raise many types
        raise CheckpointError(f"{where}: does not describe a network ({first_line(error)})") from error
