"""The check of arguments: what is refused, and with which message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tests.support.tiny import generators, picture

from limner import InvalidRequest, Pipeline

RGBA = Image.new("RGBA", (64, 64), (255, 0, 0, 128))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt: give either prompt or prompt_embeds"),
        ({"prompt": ""}, "prompt: '' is empty"),
        ({"prompt": "  \n"}, "is empty; say what"),
        ({"prompt": []}, "prompt: an empty list"),
        ({"prompt": ["a", 3]}, "prompt: int is not a text"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 48)}, "not both"),
        (
            {"prompt_embeds": torch.zeros(1, 2, 47)},
            r"prompt_embeds: have shape \[1, 2, 47\]; allowed: \(B, S_txt, 48\)",
        ),
        ({"prompt": "a", "height": 500}, "height: 500 is not a multiple of 16 of at least 64; use 496 or 512"),
        ({"prompt": "a", "width": 48}, "width: 48 is not a multiple of 16 of at least 64; use 64"),
        ({"prompt": "a", "width": -16}, "width: -16"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: 0 is not a whole number of at least 1"),
        ({"prompt": "a", "num_inference_steps": 4.0}, "num_inference_steps: 4.0"),
        ({"prompt": "a", "num_inference_steps": 10**9}, "num_inference_steps: 1000000000 is not within 1 to 1000"),
        ({"prompt": "a", "width": 64.0}, "width: 64.0 is not a whole number"),
        ({"prompt": "a", "width": "64"}, "width: '64'"),
        ({"prompt": "a", "image": 5}, "image: int is not a picture"),
        ({"prompt": 5}, "prompt: int is not a text"),
        ({"prompt": "a \udcff"}, "prompt: is not valid Unicode at character 2"),
        ({"prompt": "a", "generator": 42}, "generator: 42 is not a torch.Generator"),
        ({"prompt": "a", "latents": [[1]]}, "latents: have to be a tensor"),
        ({"prompt": "a", "latents": torch.full((1, 16, 4, 4), float("nan"))}, "latents: have to be a tensor of finite"),
        ({"prompt": "a", "sigmas": ["a"]}, "sigmas: .* is not a list of numbers"),
        ({"prompt": "a", "references": "pack"}, "references: str is not limner.References"),
        ({"prompt": "a", "text_encoder_out_layers": 3}, "text_encoder_out_layers: 3 is not a list"),
        ({"prompt_embeds": torch.full((1, 2, 48), float("inf"))}, "prompt_embeds: hold values that are not finite"),
        ({"prompt_embeds": torch.zeros(0, 2, 48)}, "prompt_embeds: have shape"),
        ({"prompt_embeds": torch.zeros(1, 2, 48, dtype=torch.int64)}, "prompt_embeds: have to be"),
        ({"prompt": "a", "sigmas": [0.5, 1.0]}, r"sigmas: \[0.5, 1.0\] has to fall"),
        ({"prompt": "a", "sigmas": []}, "sigmas"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: 0"),
        ({"prompt": "a", "generator": generators(1, 2)}, "generator: a list of 2 for 1 images"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type: 'jpg' is not one of pil, np, pt, latent"),
        ({"prompt": "a", "latents": torch.zeros(1, 3, 4, 4)}, "latents: have shape"),
        ({"prompt": "a", "latents": torch.zeros(1, 16, 4, 4), "height": 128}, "latents: are for height 64, height=128"),
        ({"prompt": "a", "latents": torch.zeros(2, 16, 4, 4)}, "latents: have batch 2"),
        ({"prompt": "a", "image": []}, "image: an empty list"),
        ({"prompt": "a", "image": [picture(64, 64), 7]}, "image 2: int is not a picture"),
        ({"prompt": "a", "image": picture(63, 64)}, "image 1: 63x64 is too small; each side has to be at least 64"),
        ({"prompt": "a", "image": picture(64, 576)}, "image 1: 64x576 is too long"),
        ({"prompt": "a", "image": RGBA}, "image 1: it is transparent"),
        (
            {"prompt": "a", "text_encoder_out_layers": [1, 2, 4]},
            "text_encoder_out_layers: .* has to name layers 0 to 3",
        ),
        ({"prompt": "a", "text_encoder_out_layers": [1, 2]}, "gives tokens of width 32, the transformer reads 48"),
        ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length: 0"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str, pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipe(**arguments)
    assert len(pipe.store) == 0


def test_refuses_image_and_references_together(pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="image and references are both given"):
        pipe("a", image=picture(64, 64), references=pipe.prefill(picture(64, 64)))
