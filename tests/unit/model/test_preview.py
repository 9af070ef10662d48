"""Small pictures of latents: the fit, the call, and what the pipeline's callback offers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limner import CheckpointError, InvalidRequest, Pipeline
from limner.model.preview import LatentPreview
from limner.tokens import pack, unpatchify


def test_fit_finds_the_map_that_made_the_pictures() -> None:
    weight, bias = torch.randn(12, 16) * 0.02, torch.full((12,), 0.5)
    latents = torch.randn(4, 16, 3, 5)
    pixels = unpatchify(torch.einsum("oc,bchw->bohw", weight, latents) + bias[:, None, None])
    found = LatentPreview.fit(latents, pixels)
    torch.testing.assert_close(found.weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, bias, atol=1e-5, rtol=0)
    small = found(latents)
    assert small.shape == (4, 3, 6, 10)
    torch.testing.assert_close(small, pixels.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(3, 16), torch.zeros(3)),
        (torch.zeros(12, 16), torch.zeros(3)),
        (torch.full((12, 16), float("nan")), torch.zeros(12)),
    ],
)
def test_maps_that_are_none_are_refused(weight: Tensor, bias: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[12, C\]|finite"):
        LatentPreview(weight, bias)


def _with_preview(folder: Path, target: Path, preview: Any) -> Path:
    shutil.copytree(folder, target)
    file = target / "limner.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | {"latent_preview": preview}))
    return target


def test_the_callback_sees_what_each_step_predicts(tiny_folder: Path, tmp_path: Path) -> None:
    """`denoised` of the last step is the result; `preview` is its small picture."""
    channels = Pipeline.from_pretrained(tiny_folder).transformer.config.in_channels
    values = {"weight": (torch.randn(12, channels) * 0.1).tolist(), "bias": [0.5] * 12}
    pipe = Pipeline.from_pretrained(_with_preview(tiny_folder, tmp_path / "model", values))
    assert pipe.latent_preview is not None
    seen: list[dict[str, Tensor]] = []

    def look(_: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors)

    arguments = {"prompt": "a cat", "height": 64, "width": 96, "generator": torch.Generator().manual_seed(0)}
    names = ("latents", "denoised", "preview")
    pipe(**arguments, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [tensors["preview"].shape for tensors in seen] == [(1, 3, 8, 12)] * 4
    assert torch.equal(seen[-1]["denoised"], seen[-1]["latents"])
    assert not torch.equal(seen[0]["denoised"], seen[0]["latents"])
    latents = seen[1]["denoised"].transpose(1, 2).reshape(1, channels, 4, 6)
    assert torch.equal(pack(latents), seen[1]["denoised"])
    assert torch.equal(seen[1]["preview"], pipe.latent_preview(latents))


def test_a_model_without_a_map_offers_no_preview(tiny_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder)
    with pytest.raises(InvalidRequest, match="latent_preview"):
        pipe("a cat", callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=("preview",))


@pytest.mark.parametrize(
    "preview", [{"weight": [[0.0]], "bias": [0.0]}, [], {"weight": [[0.0] * 4] * 12, "bias": [0.0] * 12}]
)
def test_a_map_that_does_not_fit_is_refused_when_loading(tiny_folder: Path, tmp_path: Path, preview: Any) -> None:
    with pytest.raises(CheckpointError, match="latent_preview"):
        Pipeline.from_pretrained(_with_preview(tiny_folder, tmp_path / "model", preview))


def test_the_bundled_model_has_a_preview_that_looks_like_the_picture() -> None:
    pipe = Pipeline.from_pretrained()
    seen: list[Tensor] = []
    picture = pipe(
        "a cat on a beach",
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["preview"]),
        callback_on_step_end_tensor_inputs=("preview",),
    ).images
    small = torch.nn.functional.avg_pool2d(picture, 8)
    assert (seen[-1] - small).abs().mean() < 0.06
