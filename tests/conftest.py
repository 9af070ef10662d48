"""Real tiny components, built by diffusers and transformers with random weights and saved as any model is."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import Pipeline
from limner.weights.folder import bundled_model
from tests.postgres import Server

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers share the cores; threads of OpenMP beside each other would wait and spin
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what tests start

# its own folder would be here, and holds whole paths of sources
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "limner-hypothesis"))

TEXT_LAYERS = (1, 2, 3)
MAX_TOKENS = 40


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of files that tests load stay out of the user's folder of caches."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL of this machine; whoever stops it starts it again."""
    server = Server()
    yield server
    server.remove()


def make_transformer(
    head_dim: int = 16, *, width_in: int = 16, text_width: int = 48, double: int = 2, single: int = 3
) -> Any:
    """diffusers' transformer with K/V attention processors and weights that make every part count."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    model = Flux2Transformer2DModel(
        in_channels=width_in,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=32,
        axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=False,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # the norms' weights, which would all be 1
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=(1.5 if "modulation" in name else 1.0) * p.shape[1] ** -0.5)
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline in the diffusers layout, saved by diffusers."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    tokenizer = Qwen2TokenizerFast.from_pretrained(bundled_model() / "tokenizer")
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=True,
    )
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    pipe = Flux2KleinKVPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=Qwen3ForCausalLM(text).eval(),
        tokenizer=tokenizer,
        transformer=make_transformer(),
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(tiny_folder: Path) -> Any:
    """diffusers' pipeline of the tiny folder."""
    from diffusers import Flux2KleinKVPipeline

    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_folder: Path) -> Pipeline:
    """Limner's pipeline of the tiny folder, with a store of its own."""
    return Pipeline.from_pretrained(tiny_folder)


@pytest.fixture
def tiny_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Gate:
    """Holds calls of the pipeline, before they begin, while it is shut; keeps the prompts of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self._open, self.entered = threading.Event(), threading.Event()
        self._open.set()
        call = Pipeline.__call__

        def held(own: Pipeline, prompt: Any, **options: Any) -> Any:
            self.calls.append(list(prompt))
            self.entered.set()
            assert self._open.wait(60)
            return call(own, prompt, **options)

        monkeypatch.setattr(Pipeline, "__call__", held)

    def shut(self) -> None:
        self.entered.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()
