"""The configuration of a single file of weights, which has no config.json of its own: what its shapes do not say.

Rotary axes, epsilons and groups come from the header of a file that Limner wrote, from a config.json in the same folder,
from one that the caller gives, or else are klein's, if the shapes are klein's. What the header of a GGUF file says of a
text encoder comes before all of them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from limner.config import QWEN3_4B, QWEN3_8B, TransformerConfig
from limner.errors import CheckpointError
from limner.weights.bounds import MAX_LEVELS, check_json
from limner.weights.checkpoint import Checkpoint
from limner.weights.files import TensorFile, read_json
from limner.weights.geometry import geometry_of
from limner.weights.gguf import GgufFile
from limner.weights.hyperparameters import text_hyperparameters
from limner.weights.layouts import Layout
from limner.weights.networks import empty_autoencoder

__all__ = ["CONFIG_KEY", "KINDS", "configuration_of"]

CONFIG_KEY = "limner.config"
"""Key of the configuration in the header of a single file that Limner wrote."""
KINDS = {
    "transformer": ("_class_name", "Flux2Transformer2DModel"),
    "vae": ("_class_name", "AutoencoderKLFlux2"),
    "text_encoder": ("model_type", "qwen3"),
}
"""Key and value by which a config.json names its part."""
_SAID = {"num_hidden_layers", "rms_norm_eps", "rope_parameters"}
"""What the shapes of a text encoder do not say, and the header of a GGUF file may."""


def configuration_of(file: TensorFile, layout: Layout, *, like: Path | None) -> dict[str, Any]:
    """Return the configuration of the part in a single file; `like` is a config.json of the same geometry.

    Raises `CheckpointError`.
    """
    candidates = _candidates(file, layout.part, like)
    if layout.part == "transformer":
        return _transformer_config(file, layout, candidates)
    if layout.part == "vae":
        return _autoencoder_config(file, layout, candidates)
    return _text_config(file, layout, candidates)


def _candidates(file: TensorFile, part: str, like: Path | None) -> list[tuple[Path, dict[str, Any]]]:
    """Return the configurations that may be those of a single file, the most likely first."""
    found = []
    if CONFIG_KEY in file.metadata:
        try:
            own = json.loads(file.metadata[CONFIG_KEY])
            check_json(own, where=file.path)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file.path}: {CONFIG_KEY} in its header is not JSON ({error})") from error
        if isinstance(own, dict):
            found.append((file.path, own))
    for path in (file.path.parent / "config.json", like):
        if path is not None and path.is_file():
            config, (key, value) = read_json(path), KINDS[part]
            if config.get(key) == value:
                found.append((path, config))
    return found


def _transformer_config(
    file: TensorFile, layout: Layout, candidates: list[tuple[Path, dict[str, Any]]]
) -> dict[str, Any]:
    shapes = geometry_of(layout, where=file.path)
    for path, values in candidates:
        config = TransformerConfig.from_diffusers(values, where=str(path))
        if config.head_dim == shapes.head_dim:
            return replace(
                shapes, rope_axes=config.rope_axes, rope_theta=config.rope_theta, eps=config.eps
            ).to_diffusers()
    if shapes.head_dim != 128:
        raise CheckpointError(
            f"{file.path}: its heads have {shapes.head_dim} dimensions, klein's 128; the file does not say how they are "
            "rotated (axes_dims_rope): put the config.json of its transformer beside it, or give the folder of its model"
        )
    return shapes.to_diffusers()


def _autoencoder_config(
    file: TensorFile, layout: Layout, candidates: list[tuple[Path, dict[str, Any]]]
) -> dict[str, Any]:
    """Return the configuration whose network differs least from the file; diffusers' default is that of FLUX.2.

    A decoder may have other widths than its encoder, as FLUX.2's small one: they are those of the file.
    """
    widths, found = _decoder_widths(layout), list[tuple[int, dict[str, Any]]]()
    for path, config in [*candidates, (file.path, {"_class_name": "AutoencoderKLFlux2"})]:
        groups = _fit(file, layout, path, config, found)["norm_num_groups"]
        if widths and not any(width % groups for width in widths):
            _fit(file, layout, path, config | {"decoder_block_out_channels": widths}, found)
    return min(found, key=lambda item: item[0])[1]


def _fit(
    file: TensorFile, layout: Layout, path: Path, config: dict[str, Any], found: list[tuple[int, dict[str, Any]]]
) -> dict[str, Any]:
    """Add a whole configuration to `found`, and how much its network differs from the file; return it."""
    network = empty_autoencoder(config, where=path)
    number = len(Checkpoint(file, layout, config, where=file.path).problems(network.state_dict()))
    whole: dict[str, Any] = config | json.loads(
        json.dumps({k: v for k, v in network.config.items() if not k.startswith("_")})
    )
    found.append((number, whole))
    return whole


def _decoder_widths(layout: Layout) -> list[int]:
    """Return the widths of a decoder's resolutions, the finest first; [] if the file has not all of them."""
    found = []
    for level in range(MAX_LEVELS):
        source = layout.source(f"decoder.up_blocks.{level}.resnets.0.conv1.weight")
        if source is None:
            break
        found.append((layout.tensors[source].shape or (0,))[0])
    return found[::-1] if all(found) else []


def _text_config(file: TensorFile, layout: Layout, candidates: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Return the first configuration with the file's widths; the file itself may lack the last layers."""

    def shape(target: str) -> tuple[int, ...]:
        source = layout.source(target)
        if source is None:
            raise CheckpointError(
                f"{file.path}: missing {layout.prefix}{layout.names.rule(target).source}; the file is incomplete"
            )
        return layout.tensors[source].shape or (0,)

    layer = "layers.0.self_attn"
    found = {
        "vocab_size": shape("embed_tokens.weight")[0],
        "hidden_size": shape("embed_tokens.weight")[-1],
        "head_dim": shape(f"{layer}.q_norm.weight")[0],
        "intermediate_size": shape("layers.0.mlp.up_proj.weight")[0],
    }
    found["num_attention_heads"] = shape(f"{layer}.q_proj.weight")[0] // max(found["head_dim"], 1)
    found["num_key_value_heads"] = shape(f"{layer}.k_proj.weight")[0] // max(found["head_dim"], 1)
    said = text_hyperparameters(file) if isinstance(file, GgufFile) else {}
    for name, value in found.items():
        if said.get(name, value) != value:
            raise CheckpointError(
                f"{file.path}: its header says {name}={said[name]}, its tensors are those of {value}; the file is damaged"
            )
    for config in [*(values for _, values in candidates), QWEN3_4B, QWEN3_8B]:
        if all(config.get(name) == value for name, value in found.items()):
            return _as_said(config, said)
    if said.keys() >= _SAID:
        return _as_said({"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False} | found, said)
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    raise CheckpointError(
        f"{file.path}: is no text encoder of klein and not that of the model folder ({shown}); put its config.json beside "
        "it, or give the folder of its model"
    )


def _as_said(config: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in which what the header of a file says stands in place of what it said."""
    rope = ("rope_parameters", "rope_theta", "rope_scaling") if "rope_parameters" in said else ()
    return {name: value for name, value in config.items() if name not in rope} | said
