"""Our networks from those of a diffusers pipeline in memory, and back: the tensors are shared, none is copied.

Reads no files. What diffusers attaches to its modules (LoRA layers, quantized or offloaded weights) is refused, since it
would be lost silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.errors import CheckpointError
from limner.model.autoencoder import Autoencoder
from limner.model.autoencoder_network import AutoencoderNetwork
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.weights.files import some_names
from limner.weights.networks import (
    diffusers_autoencoder,
    empty_autoencoder,
    empty_text_network,
    empty_transformer,
    text_layers,
    text_unread,
)

__all__ = [
    "as_diffusers_autoencoder",
    "restore_text_encoder",
    "share_autoencoder",
    "share_text_encoder",
    "share_transformer",
]


def share_transformer(network: Any) -> Transformer:
    """Share the tensors of a `Flux2Transformer2DModel`. Raises `CheckpointError`."""
    where = "transformer"
    tensors = _tensors(network, where)
    config = TransformerConfig.from_diffusers(dict(_plain(network).config), where=where)
    transformer = empty_transformer(config, int8=False, where=where)
    _share(transformer, tensors, where)
    return transformer


def share_autoencoder(network: Any) -> Autoencoder:
    """Share the tensors of an `AutoencoderKLFlux2`. Raises `CheckpointError`."""
    tensors = _tensors(network, "vae")
    shared = empty_autoencoder(_plain(network).config, where="vae")
    _share(shared, tensors, "vae")
    return Autoencoder(shared)


_views: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def as_diffusers_autoencoder(network: nn.Module) -> Any:
    """Return diffusers' `AutoencoderKLFlux2` with the parameters of an autoencoder's network; the same one each time."""
    if not isinstance(network, AutoencoderNetwork):
        return network
    view = _views.get(network)
    if view is None:
        with torch.device("meta"):
            view = _views[network] = diffusers_autoencoder(network.config).eval().requires_grad_(False)
    view.load_state_dict(network.state_dict(keep_vars=True), strict=True, assign=True)
    return view


def share_text_encoder(network: Any, tokenizer: Any, *, out_layers: tuple[int, ...] | None = None) -> TextEncoder:
    """Share the tensors of a Qwen3 and its tokenizer, up to the last layer that is read. Raises `CheckpointError`."""
    where = "text_encoder"
    config = _plain(network).config.to_dict()
    depth, layers = text_layers(config, out_layers, where=where)
    used = max(layers)
    tensors = {
        name: value
        for name, value in ((n.removeprefix("model."), v) for n, v in _tensors(network, where).items())
        if not text_unread(name, used=used, depth=depth)
    }
    return restore_text_encoder(tensors, tokenizer, config=config, used=used, depth=depth, out_layers=layers)


def restore_text_encoder(
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    *,
    config: Mapping[str, Any],
    used: int,
    depth: int,
    out_layers: tuple[int, ...],
) -> TextEncoder:
    """Return a text encoder of the first `used` of `depth` layers that shares tensors. Raises `CheckpointError`."""
    where = "text_encoder"
    int8 = any(name.endswith("_proj.weight_scale") for name in tensors)
    network = empty_text_network(config, used=used, depth=depth, where=where, int8=int8)
    _share(network, tensors, where)
    encoder = TextEncoder(network, tokenizer, out_layers=out_layers)
    encoder.rebuild_rotary()
    return encoder


def _plain(network: Any) -> Any:
    """Return the module under `torch.compile`."""
    return getattr(network, "_orig_mod", network)


def _tensors(network: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(network, nn.Module):
        raise CheckpointError(
            f"{where}: the pipeline has {type(network).__name__}, not a network; load that part first"
        )
    module: nn.Module = _plain(network)
    if getattr(module, "peft_config", None) or any("lora_" in name for name, _ in module.named_parameters()):
        raise CheckpointError(
            f"{where}: LoRA layers are on it; call fuse_lora() and unload_lora_weights() on the pipeline first"
        )
    for name, tensor in module.state_dict(keep_vars=True).items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype in (torch.uint8, torch.int8):
            raise CheckpointError(
                f"{where}: {name} is quantized ({type(tensor).__name__}, {str(tensor.dtype).removeprefix('torch.')}); load "
                "the pipeline without quantization, and quantize here (quantize='int8' of from_pretrained)"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{where}: {name} is offloaded; load the pipeline without device_map and offloading")
    return dict(module.state_dict())


def _share(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    expected: dict[str, Tensor] = module.state_dict()
    found = some_names("missing", expected.keys() - tensors.keys())
    found += some_names("unexpected", tensors.keys() - expected.keys())
    found += some_names(
        "other shape of", (n for n, v in expected.items() if n in tensors and tensors[n].shape != v.shape)
    )
    if found:
        raise CheckpointError(
            f"{where}: {found.rstrip('; ')}; this part was changed since it was loaded, load it again"
        )
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()
