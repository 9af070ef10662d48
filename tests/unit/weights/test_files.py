"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.support.checkpoints import tensors_of

from limner.weights.files import TensorInfo, dtype_name


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
