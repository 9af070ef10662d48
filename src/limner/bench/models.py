"""Whole models with random weights: their geometries, and a pipeline of diffusers over them in memory.

Owns the values and the configurations, for folders of full size too (benchmarks/full_size.py). Measures nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limner.bench.edit import geometry
from limner.config import MODELS, AutoencoderConfig, ModelGeometry, TextConfig, TransformerConfig
from limner.model.int8 import Int8Linear
from limner.weights.folder import bundled_model

__all__ = [
    "SIZES",
    "TINY",
    "RandomValues",
    "autoencoder_config",
    "map_int8",
    "random_pipeline",
    "text_config",
    "weight_bytes",
]

TINY = ModelGeometry(
    transformer=TransformerConfig(
        num_double_blocks=2,
        num_single_blocks=3,
        num_heads=2,
        head_dim=128,
        text_width=384,
        in_channels=16,
        out_channels=16,
    ),
    text_encoder=TextConfig(
        width=128, mlp_width=256, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=64, vocab_size=768, num_used=3
    ),
    autoencoder=AutoencoderConfig(
        encoder_channels=(4, 4, 8, 8),
        decoder_channels=(4, 4, 8, 8),
        num_resnets=1,
        latent_channels=4,
        mid_attention=False,
    ),
)
"""A model for tests."""
SIZES = {
    "tiny": TINY,
    "small": ModelGeometry(
        transformer=geometry(8, 2, 6),
        text_encoder=TextConfig(
            width=1024,
            mlp_width=3072,
            num_layers=12,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=151936,
            num_used=9,
        ),
    ),
    "klein-4b": MODELS["klein-4b"],
    "klein-9b": MODELS["klein-9b"],
}
"""The models of `limner bench --whole`. "small" has the transformer of `limner bench`, a Qwen3 of its width, and FLUX.2's
autoencoder."""
_BLOCK = 16 << 20


class RandomValues:
    """Random bfloat16 values of any shape, cut from one block: full-size models would take minutes to draw."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK, generator=generator).bfloat16()
        self._at = 0

    def of(self, name: str, shape: torch.Size) -> Tensor:
        """Return a matrix or kernel that preserves the scale of its input; ones for norms, zeros for biases."""
        if name.endswith("running_var") or (len(shape) == 1 and not name.endswith(("bias", "running_mean"))):
            return torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) < 2:
            return torch.zeros(shape, dtype=torch.bfloat16)
        number, fan_in = shape.numel(), shape[1:].numel()
        out = torch.empty(number, dtype=torch.bfloat16)
        done = 0
        while done < number:
            part = self._block[self._at : self._at + number - done]
            torch.mul(part, fan_in**-0.5, out=out[done : done + len(part)])
            done, self._at = done + len(part), (self._at + len(part) + 1013) % _BLOCK
        return out.view(shape)


def text_config(text: TextConfig, *, tied: bool = False) -> dict[str, Any]:
    """Return the `config.json` of a Qwen3; `tied` ones have no table of their own for the next token."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "tie_word_embeddings": tied,
    }


def autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the `config.json` of diffusers' autoencoder."""
    return {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": list(config.encoder_channels),
        "layers_per_block": config.num_resnets,
        "latent_channels": config.latent_channels,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": min(32, config.encoder_channels[0] // 2),
    }


def random_pipeline(
    size: ModelGeometry, *, dtype: torch.dtype, tied: bool = True, device: torch.device | str = "cpu"
) -> Any:
    """Return diffusers' `Flux2KleinKVPipeline` with random weights, made in `dtype`: nothing is there twice.

    The layers of the text encoder that no text token depends on, the last quarter, have the tensors of the first ones:
    diffusers computes them, and they need no memory.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline
    from transformers import Qwen2TokenizerFast

    text, transformer = _empty_text_encoder(size, tied=tied), _empty_transformer(size)
    with torch.device("meta"):
        autoencoder = AutoencoderKLFlux2(**_arguments(autoencoder_config(size.autoencoder)))
    values, used = RandomValues(), size.text_encoder.num_used
    for network in (transformer, text, autoencoder):
        _fill(network, values, dtype=dtype, device=torch.device(device), used=used if network is text else None)
    folder = bundled_model()
    pipe = Flux2KleinKVPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=autoencoder,
        text_encoder=text,
        tokenizer=Qwen2TokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weight_bytes(size: ModelGeometry, *, dtype: torch.dtype, tied: bool = True) -> int:
    """Return the bytes of the weights of `random_pipeline`, without making them."""
    text, used = _empty_text_encoder(size, tied=tied), size.text_encoder.num_used
    read = [tensor for name, tensor in _tensors(text) if _layer(name) is None or _layer(name, below=used) is not None]
    numbers = [tensor.numel() for tensor in read] + [p.numel() for p in _empty_transformer(size).parameters()]
    return sum(numbers) * dtype.itemsize


def map_int8(network: nn.Module) -> None:
    """Put int8 matrices into temporary files that are mapped, as those of a model's folder are.

    Their copies in oneDNN's layout are what products read; without this both would be in memory. The files have no names,
    and are gone when the network is. They are in the folder of `tempfile`, which has to be on a disk.
    """
    for module in network.modules():
        if isinstance(module, Int8Linear):
            with tempfile.NamedTemporaryFile() as file:
                mapped = torch.from_file(file.name, shared=True, size=module.weight.numel(), dtype=torch.int8)
                module.weight = mapped.view(module.weight.shape).copy_(module.weight)


def _empty_text_encoder(size: ModelGeometry, *, tied: bool) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**text_config(size.text_encoder, tied=tied))
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


def _empty_transformer(size: ModelGeometry) -> Any:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel(**_arguments(size.transformer.to_diffusers()))


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return parameters and buffers that files hold, each once."""
    seen = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _layer(name: str, *, below: int | None = None) -> int | None:
    """Return the number of the text encoder's layer that a tensor is of, if it is `below`; None for others."""
    head, _, rest = name.removeprefix("model.").partition(".")
    number = int(rest.split(".")[0]) if head == "layers" else None
    return number if number is not None and (below is None or number < below) else None


def _fill(
    network: nn.Module, values: RandomValues, *, dtype: torch.dtype, device: torch.device, used: int | None
) -> None:
    """Give random weights to a network on the meta device; layers from `used` on have the tensors of the first ones."""
    made: dict[str, Tensor] = {}
    for name, empty in _tensors(network):
        number = None if used is None else _layer(name)
        if used is not None and number is not None and number >= used:
            made[name] = made[name.replace(f"layers.{number}.", f"layers.{number - used}.", 1)]
        else:
            kind = dtype if empty.is_floating_point() else empty.dtype
            made[name] = values.of(name, empty.shape).to(device, kind)
    network.load_state_dict(made, strict=False, assign=True)
    if used is not None:  # what is in no file: tied weights and the rotary table
        network.tie_weights()  # type: ignore[operator]
        with device:
            network.model.rotary_emb = type(network.model.rotary_emb)(network.config)  # type: ignore
    left = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    assert not left, f"without values: {left}"
    network.requires_grad_(False)
    network.eval()
