"""Networks shared with a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import close, draw
from tests.support.tiny import picture

from limner import CheckpointError, Pipeline


def test_from_diffusers_shares_tensors(oracle: Any, tiny_folder: Path) -> None:
    pipe, loaded = Pipeline.from_diffusers(oracle), Pipeline.from_pretrained(tiny_folder)
    theirs = oracle.transformer.state_dict()
    for name, value in pipe.transformer.state_dict().items():
        assert value.data_ptr() == theirs[name].data_ptr(), name
    for ours, other in (
        (pipe.autoencoder.network, oracle.vae.state_dict()),
        (pipe.text_encoder.network, {n.removeprefix("model."): v for n, v in oracle.text_encoder.state_dict().items()}),
    ):
        for name, value in ours.state_dict().items():
            assert value.data_ptr() == other[name].data_ptr(), name
    assert len(pipe.text_encoder.network.layers) == 3 < len(oracle.text_encoder.model.layers)
    assert pipe.digest == loaded.digest
    close(draw(pipe), draw(loaded))
    key = pipe.prefill(picture(64, 64)).key
    with torch.no_grad():
        oracle.transformer.x_embedder.weight.mul_(2)
    assert pipe.prefill(picture(64, 64)).key != key  # a change of the other pipeline is seen
    with torch.no_grad():
        oracle.transformer.x_embedder.weight.div_(2)
    pipe.to(torch.bfloat16)
    assert oracle.transformer.dtype == oracle.vae.dtype == torch.float32  # and ours is not theirs


def test_from_diffusers_refuses_what_would_be_lost(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="pipeline: is a dict; allowed: those of diffusers"):
        Pipeline.from_diffusers({})
    with monkeypatch.context() as patch:
        patch.setattr(oracle.transformer, "peft_config", {"default": 1}, raising=False)
        with pytest.raises(CheckpointError, match=r"transformer: LoRA layers are on it; call fuse_lora\(\)"):
            Pipeline.from_diffusers(oracle)
    with monkeypatch.context() as patch:
        patch.setitem(oracle.vae._modules, "quant_conv", torch.nn.Conv2d(8, 8, 1, device="meta"))
        with pytest.raises(CheckpointError, match=r"vae: quant_conv\..* is offloaded"):
            Pipeline.from_diffusers(oracle)
    with monkeypatch.context() as patch:
        patch.setitem(oracle.transformer._modules, "proj_out", torch.nn.Linear(32, 16))
        with pytest.raises(CheckpointError, match="transformer: unexpected proj_out.bias"):
            Pipeline.from_diffusers(oracle)


def test_an_autoencoder_with_diffusers_defaults(oracle: Any) -> None:
    """diffusers notes which settings are its defaults, in a list that is longer than any of a network."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinKVPipeline

    sizes = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
    vae = AutoencoderKLFlux2(**sizes)
    assert len(vae.config["_use_default_values"]) > 8
    pipe = Flux2KleinKVPipeline(**{**oracle.components, "vae": vae})
    assert Pipeline.from_diffusers(pipe).autoencoder.factor == 16
