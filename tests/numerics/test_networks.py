"""Our networks of autoencoder and text encoder are those of diffusers and transformers: the same names, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limner import Flux2KleinKVPipeline
from limner.config import QWEN3_4B
from limner.model import strips
from limner.model.autoencoder import Autoencoder
from limner.model.autoencoder_network import DEFAULTS, AutoencoderNetwork
from limner.model.qwen3 import Qwen3
from limner.model.text_encoder import TextEncoder, TokenizedPrompt
from limner.weights.folder import bundled_model
from limner.weights.networks import diffusers_autoencoder, empty_autoencoder, empty_text_network

AUTOENCODERS: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2},
    "FLUX.2's layout": {"block_out_channels": [32, 64, 96, 96], "_class_name": "AutoencoderKLFlux2"},
    "FLUX.2's small decoder": {
        "block_out_channels": [8, 16, 24, 24],
        "decoder_block_out_channels": [4, 8, 16, 20],
        "norm_num_groups": 4,
        "force_upcast": True,  # an older configuration
    },
    "neither attention nor 1x1 convolutions": {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "latent_channels": 3,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "act_fn": "swish",
    },
}


def randomised(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for which each tensor matters, norms included."""
    values = {}
    for name, like in network.state_dict().items():
        if like.dtype == torch.int64:
            values[name] = torch.zeros_like(like, device="cpu")
        elif like.dim() > 1:
            values[name] = torch.randn(like.shape) * like[0].numel() ** -0.5
        else:
            values[name] = torch.rand(like.shape) + 0.5
    return values


def filled(network: Any, values: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    network.to_empty(device="cpu").load_state_dict(values, strict=True)
    return network.to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_the_autoencoder_is_diffusers(name: str, dtype: torch.dtype) -> None:
    config = AUTOENCODERS[name]
    with torch.device("meta"):
        theirs = diffusers_autoencoder(config)
    ours = empty_autoencoder(config, where="test")
    assert isinstance(ours, AutoencoderNetwork)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    said = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (ours, theirs)]
    assert json.dumps(said[0], sort_keys=True) == json.dumps(said[1], sort_keys=True)  # in keys of references
    values = randomised(ours)
    theirs, ours = filled(theirs, values, dtype), filled(ours, values, dtype)
    pixels = torch.rand(2, 3, 48, 32).to(dtype) * 2 - 1
    moments = theirs.encode(pixels).latent_dist
    wrapped = Autoencoder(ours)
    assert torch.equal(wrapped.encode(pixels), Autoencoder(theirs).encode(pixels))
    z = ours.encoder(pixels) if ours.quant_conv is None else ours.quant_conv(ours.encoder(pixels))
    assert torch.equal(z, moments.parameters)
    latents = torch.randn(2, config.get("latent_channels", 32), 6, 4).to(dtype)
    expected = theirs.decode(latents).sample
    assert torch.equal(wrapped.decode(latents), expected)
    assert torch.equal(strips.encode(ours, pixels), strips.encode(theirs, pixels))
    assert torch.equal(strips.decode(ours, latents), strips.decode(theirs, latents))


def test_what_a_configuration_leaves_out_is_diffusers() -> None:
    with torch.device("meta"):
        theirs = diffusers_autoencoder({}).config
    assert {name: theirs[name] for name in DEFAULTS} == DEFAULTS
    assert set(theirs) - {"_use_default_values"} == set(DEFAULTS)
    changed = dict(theirs) | {"norm_num_groups": 16}  # diffusers then takes its default all the same
    assert AutoencoderNetwork(changed | AUTOENCODERS["tiny"]).config["batch_norm_eps"] == 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2}
        | {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
        {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "act_fn": "gelu"},
    ],
)
def test_other_blocks_are_those_of_diffusers(config: dict[str, Any]) -> None:
    from diffusers import AutoencoderKLFlux2

    network = empty_autoencoder(config, where="test")
    assert isinstance(network, AutoencoderKLFlux2)
    values = randomised(network)
    network = filled(network, values)
    latents = torch.randn(1, 32, 6, 4)
    assert torch.equal(Autoencoder(network).decode(latents), network.decode(latents).sample)


QWEN = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
TEXTS = {
    "two heads to one": QWEN,
    "a head each": QWEN | {"num_key_value_heads": 4, "rope_theta": 10_000},
    "as transformers 5 says it": {name: value for name, value in QWEN.items() if name != "rope_theta"}
    | {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "rms_norm_eps": 1e-3, "sliding_window": None},
}
UNUSUAL: dict[str, dict[str, Any]] = {
    "windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "stretched rotation": {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}},
    "biases": {"attention_bias": True},
    "another function": {"hidden_act": "gelu"},
    "an unknown key": {"is_causal": False},
}


def tokens(*lengths: int, size: int = 12, left: bool = False) -> list[TokenizedPrompt]:
    made = []
    for length in lengths:
        mask = torch.tensor([1] * length + [0] * (size - length))
        mask = mask.flip(0) if left else mask
        made.append(TokenizedPrompt(ids=torch.randint(64, (size,)) * mask, mask=mask, num_tokens=length, cut=""))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_the_text_encoder_is_transformers(name: str, dtype: torch.dtype) -> None:
    from transformers import Qwen3Config, Qwen3Model

    config = TEXTS[name]
    with torch.device("meta"):
        theirs = Qwen3Model(Qwen3Config.from_dict(dict(config)))
    ours = empty_text_network(config, used=4, depth=4, where="test")
    assert isinstance(ours, Qwen3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    values = randomised(ours)
    theirs, ours = (TextEncoder(filled(one, values, dtype), None, out_layers=(0, 1, 3, 4)) for one in (theirs, ours))
    theirs.rebuild_rotary()
    ours.rebuild_rotary()
    for prompts in (tokens(12), tokens(5), tokens(12, 12), tokens(12, 3), tokens(7, 4, left=True), tokens(1, size=1)):
        found, expected = ours(prompts), theirs(prompts)
        assert found.shape == (len(prompts), len(prompts[0].ids), 4 * 32)
        assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)  # padding on the left reads nothing


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_text_encoders_are_those_of_transformers(name: str) -> None:
    from transformers import Qwen3Model

    network = empty_text_network(QWEN | UNUSUAL[name], used=3, depth=4, where="test")
    assert isinstance(network, Qwen3Model)


def test_kleins_and_the_bundled_networks_are_our_own(tiny_folder: Path) -> None:
    for folder in (bundled_model(), tiny_folder):
        text, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("text_encoder", "vae"))
        assert isinstance(empty_text_network(text, used=3, depth=4, where="test"), Qwen3)
        assert isinstance(empty_autoencoder(vae, where="test"), AutoencoderNetwork)
    assert isinstance(empty_text_network(QWEN3_4B, used=27, depth=36, where="test"), Qwen3)


def test_parts_are_shown_as_those_of_diffusers_and_shared(tiny_folder: Path) -> None:
    from diffusers import AutoencoderKLFlux2

    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    vae, own = pipe.vae, pipe.autoencoder.network
    assert isinstance(vae, AutoencoderKLFlux2)
    assert vae is pipe.vae
    assert vae.decoder.conv_in.weight is own.decoder.conv_in.weight
    assert not own.decoder.conv_in.weight.requires_grad
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(vae.decode(latents).sample, pipe.autoencoder.decode(latents))
    pipe.to(torch.bfloat16)
    assert pipe.vae.bn.running_mean.dtype == pipe.vae.dtype == torch.bfloat16
    other = AutoencoderKLFlux2.from_config(vae.config)
    pipe.vae = other
    assert isinstance(pipe.autoencoder.network, AutoencoderNetwork)
    assert torch.equal(pipe.vae.decoder.conv_in.weight, other.decoder.conv_in.weight)
    assert pipe.vae is not vae
