"""Digests of weights that other processes left: taken for the same bytes alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from limner import Pipeline
from limner.weights import digest
from limner.weights.digest import WeightDigests, file_stamp

FILE = Path("transformer", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one whenever all bytes of a network are read; files may be as new as those of tests are."""
    found: list[Any] = []
    whole = digest._digest
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_SETTLED", -1.0)
    monkeypatch.setattr(digest, "_digest", lambda tensors, **more: found.append(tensors) or whole(tensors, **more))
    return found


def test_a_second_process_hashes_nothing(tiny_copy: Path, hashed: list[Any]) -> None:
    first = Pipeline.from_pretrained(tiny_copy).digest
    assert len(hashed) == 3
    assert Pipeline.from_pretrained(tiny_copy).digest == first
    assert len(hashed) == 3
    other = Pipeline.from_pretrained(tiny_copy, dtype=torch.bfloat16)  # made from the same files
    assert other.digest != first
    assert len(hashed) == 6


def test_nor_for_a_single_file(tiny_copy: Path, hashed: list[Any]) -> None:
    file = tiny_copy / FILE
    first = Pipeline.from_pretrained(tiny_copy, transformer=file).reference_weights
    number = len(hashed)
    assert Pipeline.from_pretrained(tiny_copy, transformer=file).reference_weights == first
    assert len(hashed) == number
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    assert Pipeline.from_pretrained(tiny_copy, transformer=file).reference_weights != first


@pytest.mark.parametrize("how", ["version", "data", "replaced"])
def test_changed_tensors_are_hashed(how: str, tiny_copy: Path, hashed: list[Any]) -> None:
    before = Pipeline.from_pretrained(tiny_copy).reference_weights
    pipe = Pipeline.from_pretrained(tiny_copy)
    linear = pipe.transformer.x_embedder
    if how == "version":
        linear.weight.mul_(2)
    elif how == "data":
        linear.weight.data[3] *= 2
    else:
        linear.weight = torch.nn.Parameter(linear.weight * 2)
    assert pipe.reference_weights != before
    assert Pipeline.from_pretrained(tiny_copy).reference_weights == before  # nothing of it was left for others


def test_changed_files_are_hashed(tiny_copy: Path, hashed: list[Any]) -> None:
    """Of the same size and with the old time set again; the byte is none that is sampled."""
    before, file = Pipeline.from_pretrained(tiny_copy).reference_weights, tiny_copy / FILE
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Pipeline.from_pretrained(tiny_copy).reference_weights != before


def test_what_was_left_is_not_trusted_blindly(tiny_copy: Path, tmp_path: Path, hashed: list[Any]) -> None:
    before = Pipeline.from_pretrained(tiny_copy).digest
    for text in ("", "[]", "{", json.dumps({"samples": "0" * 64, "digest": "1" * 64}), json.dumps({"digest": 3})):
        left = list((tmp_path / "cache" / "digests").iterdir())
        assert len(left) == 3
        for file in left:
            file.write_text(text)
        assert Pipeline.from_pretrained(tiny_copy).digest == before


def test_works_without_a_cache(tiny_copy: Path, tmp_path: Path, hashed: list[Any]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len({Pipeline.from_pretrained(tiny_copy).digest for _ in range(2)}) == 1
    assert len(hashed) == 6


def test_new_files_have_no_stamp(tiny_copy: Path) -> None:
    """A second write within the clock's tick would not show."""
    (tiny_copy / FILE).touch()
    assert file_stamp(tiny_copy / "transformer") is None
    assert file_stamp(tiny_copy / "nothing") is None


def test_a_move_changes_no_digest(tiny_copy: Path, hashed: list[Any]) -> None:
    """To another device: other addresses, the same values. What was changed before it is hashed all the same."""
    before = Pipeline.from_pretrained(tiny_copy).reference_weights
    number = len(hashed)
    pipe = Pipeline.from_pretrained(tiny_copy)
    for _ in range(2):  # as it was loaded; then known
        with pipe._digests.moving(pipe.transformer):
            for parameter in pipe.transformer.parameters():
                parameter.data = parameter.data.clone()
        assert pipe.reference_weights == before
    assert len(hashed) == number
    pipe.transformer.x_embedder.weight.data[0] *= 2
    assert pipe.to("cpu").reference_weights != before
    assert pipe.to(torch.bfloat16).reference_weights != before


def test_a_network_that_was_not_loaded_is_hashed(hashed: list[Any]) -> None:
    module, digests = torch.nn.Linear(3, 2), WeightDigests()
    assert len({digests.of(module) for _ in range(2)}) == 1
    assert len(hashed) == 1
