"""Finding the file of a LoRA, and never opening a pickle."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lora_files import PAIRS, make_pairs, original, peft, write

from limner import CheckpointError, InvalidRequest, Pipeline
from limner.model.lora import matrix_shapes
from limner.weights.lora import load_lora


def test_finds_the_file(tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = matrix_shapes(pipe.transformer)
    with pytest.raises(CheckpointError, match=r"nothing.safetensors is neither a file, a folder nor a hub id"):
        pipe.load_lora_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="is not a path"):
        pipe.load_lora_weights(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="names to tensors"):
        pipe.load_lora_weights({"a": 3})  # type: ignore[dict-item]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="it has none"):
        pipe.load_lora_weights(folder)
    expected = load_lora(write(folder, original(PAIRS), "a.safetensors"), shapes=shapes)
    assert load_lora(folder, shapes=shapes).digest == expected.digest
    write(folder, original(make_pairs(1)), "b.safetensors")
    with pytest.raises(CheckpointError, match=r"it has 2 \(a.safetensors, b.safetensors\); name one with weight_name"):
        pipe.load_lora_weights(folder)
    assert load_lora(folder, shapes=shapes, weight_name="a.safetensors").digest == expected.digest
    with pytest.raises(CheckpointError, match=r"has no 'c.safetensors'; it has a.safetensors, b.safetensors"):
        pipe.load_lora_weights(folder, weight_name="c.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"b.safetensors: cannot be read .* truncated or damaged"):
        pipe.load_lora_weights(folder / "b.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nobody/nothing is not in the local cache and could not be downloaded"):
        pipe.load_lora_weights("nobody/nothing")


def test_a_hub_id_from_the_local_cache(tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--style" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    expected = load_lora(write(snapshot, original(PAIRS), "style.safetensors"), shapes=matrix_shapes(pipe.transformer))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load_lora("someone/style", shapes=matrix_shapes(pipe.transformer))
    assert found.digest == expected.digest


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt", "lora.safetensors"])
@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_pickles_are_never_opened(name: str, save: Any, tmp_path: Path, pipe: Pipeline) -> None:
    folder, file = tmp_path / "folder", tmp_path / "folder" / name
    folder.mkdir()
    save(Trap(tmp_path / "sprung"), file)
    for source in (file, folder):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle and is never opened"):
            pipe.load_lora_weights(source)
    assert not (tmp_path / "sprung").exists()


def test_configurations_that_name_code_are_refused(tmp_path: Path, pipe: Pipeline) -> None:
    file = write(tmp_path, peft(PAIRS), "adapter_model.safetensors")
    code: dict[str, object] = {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4} | code))
    with pytest.raises(CheckpointError, match="auto_mapping=.* names code to run"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        pipe.load_lora_weights(tmp_path)
    file.unlink()
    header = write(tmp_path, original(PAIRS), lora_adapter_metadata=json.dumps({"transformer.r": 4} | code))
    with pytest.raises(CheckpointError, match="auto_mapping=.* names code to run"):
        pipe.load_lora_weights(header)
