"""From options to a pipeline, and what is refused before weights are read."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.lora_files import make_pairs, original

from limner import Pipeline, ReferenceStore
from limner.engine.load import check_model, load_in_thread, load_pipeline, reference_policy
from limner.errors import CheckpointError, InvalidRequest
from limner.options import ModelOptions


def test_loras_have_the_names_of_their_files() -> None:
    """Which requests use; several of one name stay apart."""
    names = ("styles/ink.safetensors", "owner/style-v1.5", "a/b.c/", "other/ink.safetensors", "ink-2", "third/ink")
    options = ModelOptions(loras=tuple((name, 1.0) for name in names))
    assert options.lora_names == ("ink", "style-v1.5", "b.c", "ink-2", "ink-2-2", "ink-3")


def test_options_are_those_of_the_pipeline(tiny_folder: Path, tmp_path: Path) -> None:
    save_file(original(make_pairs()), tmp_path / "style.safetensors")
    options = ModelOptions(
        model=str(tiny_folder),
        dtype="bfloat16",
        background="white",
        max_pixels=4096,
        loras=((str(tmp_path / "style.safetensors"), 0.5),),
    )
    store = ReferenceStore(memory_bytes=0)
    heard: list[str] = []
    pipe = load_pipeline(options, store=store, progress=lambda part, done, of: heard.append(part))
    assert (pipe.dtype, pipe.store) == (torch.bfloat16, store)
    assert (pipe.reference_policy.background, pipe.reference_policy.max_pixels) == ("white", 4096)
    assert pipe.get_active_adapters() == ["style"]
    assert "load" in heard


@pytest.mark.parametrize("max_pixels", [None, 8192])
def test_the_policy_is_known_before_the_weights_are(max_pixels: int | None, tiny_folder: Path, tmp_path: Path) -> None:
    for model in (None, str(tiny_folder)):
        options = ModelOptions(model=model, max_pixels=max_pixels, background="#fff")
        assert reference_policy(options) == load_pipeline(options).reference_policy
    shutil.copy(tiny_folder / "model_index.json", tmp_path)
    (tmp_path / "limner.json").write_text('{"max_reference_pixels": 4096}')
    assert reference_policy(ModelOptions(model=str(tmp_path))).max_pixels == 4096  # no weights are there
    assert reference_policy(ModelOptions(model="some/hub-id")).max_pixels is None


def test_what_can_be_refused_before_weights_are_read() -> None:
    check_model(ModelOptions(model="/not/there"))
    with pytest.raises(InvalidRequest, match="max_pixels: 1 is not allowed"):
        check_model(ModelOptions(max_pixels=1))
    with pytest.raises(CheckpointError, match="missing.safetensors"):
        check_model(ModelOptions(loras=(("missing.safetensors", 1.0),)))


def test_the_thread_that_loads_has_ended(tiny_folder: Path) -> None:
    threads: list[threading.Thread] = []

    def load() -> Pipeline:
        threads.append(threading.current_thread())
        return load_pipeline(ModelOptions(model=str(tiny_folder)))

    assert isinstance(load_in_thread(load), Pipeline)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()
