"""Latents of a call that are decoded later: what that takes, keeps alive and refuses."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from tests.support.tiny import generators

from limner import InvalidRequest, Pipeline

CALL = {"width": 64, "height": 64, "num_inference_steps": 1}


def test_latents_decode_to_the_pictures_of_the_call(pipe: Pipeline) -> None:
    latents = pipe("a hat", generator=generators(3), output_type="latent", **CALL)
    expected = pipe("a hat", generator=generators(3), output_type="pt", **CALL)
    assert torch.equal(latents.decoded("pt").images, expected.images)


@pytest.mark.parametrize("output_type", ["latent", "jpeg", None])
def test_another_type_is_refused(pipe: Pipeline, output_type: str) -> None:
    latents = pipe("a hat", output_type="latent", **CALL)
    with pytest.raises(InvalidRequest, match="output_type: .* is none of 'pil', 'np', 'pt'"):
        latents.decoded(output_type)


def test_latents_can_be_pickled_and_then_are_numbers_alone(pipe: Pipeline) -> None:
    latents = pipe("a hat", output_type="latent", **CALL)
    copy = pickle.loads(pickle.dumps(latents))
    assert torch.equal(copy.images, latents.images)
    with pytest.raises(InvalidRequest, match="pickled copy"):
        copy.decoded()


def test_latents_keep_the_autoencoder_alone(tiny_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder)
    latents = pipe("a hat", output_type="latent", **CALL)
    transformer, text = weakref.ref(pipe.transformer), weakref.ref(pipe.text_encoder)
    del pipe
    gc.collect()
    assert (transformer(), text()) == (None, None)
    assert latents.decoded().images[0].size == (64, 64)
