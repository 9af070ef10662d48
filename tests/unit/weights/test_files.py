"""Files of tensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.checkpoints import tensors_of

from limner import CheckpointError
from limner.weights.files import SafetensorsFile, TensorInfo, check_regular, dtype_name
from limner.weights.lora.source import resolve_lora


def test_save_file_is_the_library(tmp_path: Path) -> None:
    """The writer that takes one tensor at a time writes what the library's writer does."""
    from limner.weights.files import write_tensors

    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.tensor(7), "c": torch.randn(7), "d": torch.zeros(0, 2)}
    tensors["e"] = torch.arange(5, dtype=torch.int8)
    infos = {
        n: TensorInfo(dtype=dtype_name(v.dtype), shape=tuple(v.shape), nbytes=v.nbytes) for n, v in tensors.items()
    }
    write_tensors(tmp_path / "a", infos, reversed(list(tensors.items())), metadata={"x": "y"})
    save_file(tensors, tmp_path / "b", metadata={"format": "pt", "x": "y"})
    assert tensors_of(tmp_path / "a").keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in tensors_of(tmp_path / "a").items())
    start = 8 + int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert start % 64 == 0
    end = sum(value.nbytes for value in tensors.values())
    assert (tmp_path / "a").read_bytes()[start:] == (tmp_path / "b").read_bytes()[-end:]


def safetensors_with_header(path: Path, length: int) -> Path:
    """Writes a valid file whose header has exactly so many bytes."""
    entry = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(length.to_bytes(8, "little") + entry.ljust(length) + bytes(4))
    return path


@pytest.mark.parametrize("length", [0x80, 0x280, 0x480, 0x580, 0x10280, 0x10580, 0x20480, 0x4034B50])
def test_safetensors_are_taken_for_no_pickle_whatever_their_header_measures(length: int, tmp_path: Path) -> None:
    """The length comes first in the file, and may be the first bytes of a pickle or of a zip archive."""
    path = safetensors_with_header(tmp_path / "a.safetensors", length)
    check_regular(path)
    assert resolve_lora(path) == path
    if length < 1 << 20:
        assert SafetensorsFile(path).read("a").tolist() == [0]


def test_pickles_are_refused_by_content(tmp_path: Path) -> None:
    contents = [
        pickle.dumps({"a": list(range(n))}, protocol=protocol) for n in (0, 9, 9999) for protocol in range(2, 6)
    ]
    torch.save({"a": torch.zeros(2)}, tmp_path / "new")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for data in [*contents, (tmp_path / "new").read_bytes(), (tmp_path / "old").read_bytes()]:
        (tmp_path / "a.safetensors").write_bytes(data)
        for read in (check_regular, resolve_lora):
            with pytest.raises(CheckpointError, match="is a pickle"):
                read(tmp_path / "a.safetensors")
