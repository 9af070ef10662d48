"""Bytes of weights and K/V against real networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.tiny import picture

from limner import Pipeline
from limner.config import MODELS, QWEN3_4B, QWEN3_8B, AutoencoderConfig, TextConfig
from limner.memory import Formats, autoencoder_bytes, kv_bytes, text_bytes, transformer_bytes
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer


def nbytes(module: torch.nn.Module, itemsize: int) -> int:
    return sum(t.numel() * itemsize for t in module.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_are_those_of_the_networks(name: str) -> None:
    """To the byte: what the plan says, and what networks of that geometry on the meta device have."""
    geometry = MODELS[name]
    for quantize in (None, "int8"):
        network = empty_transformer(geometry.transformer, int8=quantize is not None, where="test")
        found = sum(t.nbytes for t in network.state_dict().values())
        itemsize = 4  # of the meta network: its wide tensors are float32
        assert transformer_bytes(geometry.transformer, Formats(itemsize=itemsize, quantize=quantize)) == found
    config = {"klein-4b": QWEN3_4B, "klein-9b": QWEN3_8B}[name]
    assert replace(TextConfig.from_transformers(config), num_used=27) == geometry.text_encoder
    for quantize_text in (False, True):
        text = empty_text_network(config, used=27, depth=36, where="test", int8=quantize_text)
        found = sum(t.nbytes for t in text.state_dict().values())
        assert text_bytes(geometry.text_encoder, Formats(itemsize=4, quantize_text=quantize_text)) == found
    assert autoencoder_bytes(AutoencoderConfig(), itemsize=2) == nbytes(empty_autoencoder({}, where="test"), 2)


def test_weights_of_a_small_model(pipe: Pipeline) -> None:
    geometry = pipe.geometry
    assert transformer_bytes(geometry.transformer, Formats(itemsize=4)) == nbytes(pipe.transformer, 4)
    assert (
        text_bytes(geometry.text_encoder, Formats(itemsize=4)) == nbytes(pipe.text_encoder.network, 4) + 4 * 16
    )  # its norm
    assert autoencoder_bytes(geometry.autoencoder, itemsize=4) == nbytes(pipe.autoencoder, 4)
    refs = pipe.prefill([picture(64, 64), picture(96, 64)])
    assert kv_bytes(geometry.transformer, refs.num_tokens, itemsize=4, kv=None) == refs.nbytes == pipe.kv_bytes(40)
    narrow = Pipeline(
        transformer=pipe.transformer,
        autoencoder=pipe.autoencoder,
        text_encoder=pipe.text_encoder,
        kv_cache_dtype="int8",
    )
    assert narrow.prefill(picture(64, 64)).nbytes == narrow.kv_bytes(16)
