"""Real tiny components, built by diffusers and transformers with random weights and saved as any model is."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from limner import Pipeline
from limner.weights.folder import bundled_model
from tests.support.postgres import Server
from tests.support.pretend import PretendedDevice, pretended_device
from tests.support.tiny import make_transformer

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers share the cores; threads of OpenMP beside each other would wait and spin
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what tests start

# its own folder would be here, and holds whole paths of sources
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "limner-hypothesis"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of files that tests load stay out of the user's folder of caches."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """A GPU that is not there: "cuda" tensors that compute on the CPU, refuse other devices, and count what waits."""
    with pretended_device(monkeypatch) as device:
        yield device


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL of this machine; whoever stops it starts it again."""
    server = Server()
    yield server
    server.remove()


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


def _as_kind(folder: Path, copy: Path, name: str, **index: object) -> Path:
    """Copy a model's folder, as one of another class of diffusers."""
    shutil.copytree(folder, copy)
    file = copy / "model_index.json"
    found = {key: value for key, value in json.loads(file.read_text()).items() if key != "is_distilled"}
    file.write_text(json.dumps(found | {"_class_name": name} | index))
    return copy


@pytest.fixture(scope="session")
def standard_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a standard klein: joint references, distilled."""
    return _as_kind(tiny_folder, tmp_path_factory.mktemp("standard") / "m", "Flux2KleinPipeline", is_distilled=True)


@pytest.fixture(scope="session")
def base_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a base klein, which needs guidance; nothing says `is_distilled`."""
    return _as_kind(tiny_folder, tmp_path_factory.mktemp("base") / "m", "Flux2KleinPipeline")
