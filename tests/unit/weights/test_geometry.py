"""The geometry of a transformer, from the shapes in its header."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support import checkpoints as made
from tests.support.checkpoints import TRANSFORMER, sparse

from limner import CheckpointError
from limner.config import KLEIN_4B, KLEIN_9B, TransformerConfig
from limner.model.transformer import Transformer
from limner.weights.files import TensorInfo
from limner.weights.folder import bundled_model
from limner.weights.geometry import geometry_name, geometry_of
from limner.weights.parts import open_part


@pytest.mark.parametrize(("config", "name"), [(KLEIN_4B, "klein-4B"), (KLEIN_9B, "klein-9B")])
def test_true_geometry(config: TransformerConfig, name: str, tmp_path: Path) -> None:
    """Names and shapes of diffusers' own class, in the original layout, as a file whose tensors are holes."""
    from diffusers import Flux2Transformer2DModel

    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(**values).bfloat16().state_dict()
        ours = Transformer(config).state_dict()
    found = open_part("transformer", sparse(made.original(theirs), tmp_path / "klein.safetensors"))
    assert geometry_of(found.layout, where=tmp_path) == config
    assert geometry_name(config) == name
    assert str(found.problems(ours)) == ""
    for target, value in theirs.items():
        assert found.info(target) == TensorInfo(dtype="BF16", shape=tuple(value.shape), nbytes=value.nbytes)
    both = open_part("transformer", sparse(theirs, tmp_path / "diffusers.safetensors"))
    assert (both.layout.kind, both.config) == ("diffusers", found.config)
    guided = made.original(theirs) | {"guidance_in.in_layer.weight": torch.empty(4, 4, device="meta")}
    with pytest.raises(
        CheckpointError, match=r"has a guidance embedding .*FLUX.2-dev-like.*guidance_in.in_layer.weight"
    ):
        open_part("transformer", sparse(guided, tmp_path / "dev.safetensors"))


def test_the_bundled_model_has_a_name() -> None:
    file = bundled_model() / TRANSFORMER
    found = open_part("transformer", file)  # its config.json lies beside it
    config = TransformerConfig.from_diffusers(found.config)
    assert geometry_name(config, config) == "bundled"
    assert config.head_dim == 64
