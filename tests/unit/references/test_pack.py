"""The pack file: what is read back, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.tiny import picture

from limner import InvalidRequest, OutputError, Pipeline, References
from limner.references import DamagedPack, read_identity


def test_other_files_are_refused(tmp_path: Path, pipe: Pipeline) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidRequest, match="is not a reference pack"):
        References.load(tmp_path / "other.safetensors")
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "new.safetensors", metadata={"limner.references": json.dumps({"format": 99})}
    )
    with pytest.raises(InvalidRequest, match="has pack format 99, this version reads 3"):
        References.load(tmp_path / "new.safetensors")
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DamagedPack, match="is damaged or edited"):
        References.load(file)
    for path in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(InvalidRequest, match="cannot be read") as caught:
            References.load(path)
        assert not isinstance(caught.value, DamagedPack)  # nothing says that such a pack is not whole
    with pytest.raises(OutputError, match="cannot be written"):
        pipe.prefill(picture(64, 64)).save(tmp_path / "nowhere" / "pack.safetensors")


def rewrite(file: Path, change: dict[str, object], *, sealed: bool) -> dict[str, torch.Tensor]:
    """Edits the identity in a pack's header, with its digest made anew or left; gives the tensors."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    text = json.dumps(json.loads(metadata["limner.references"]) | change)
    metadata["limner.references"] = text
    if sealed:
        metadata["limner.references.sha256"] = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, file, metadata=metadata)
    return tensors


REPORT = {
    "original_size": [96, 64],
    "oriented": False,
    "resized_to": None,
    "cut": [0, 0, 0, 0],
    "processed_size": [96, 64],
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"key": "FORGED"},
        {"reports": []},
        {"reports": 5},
        {"reports": [{"more": 1}]},
        {"reports": [REPORT | {"processed_size": None, "digest": "0" * 64}]},
        {"reports": [REPORT | {"processed_size": [48, 64], "digest": "0" * 64}]},
        {"reports": [REPORT | {"cut": [0, 0], "digest": "0" * 64}]},
        {"reports": [REPORT | {"oriented": 1, "digest": "0" * 64}]},
        {"reports": [REPORT | {"original_size": [math.inf, 64], "digest": "0" * 64}]},
        {"num_layers": 0},
        {"num_layers": 2},
        {"num_layers": "a"},
        {"num_layers": math.inf},
        {"num_layers": True},
        {"prefill_seconds": math.nan},
        {"prefill_seconds": -1},
        {"prefill_seconds": "1"},
        {"weights": "0" * 64},
        {"weights": 3},
        {"kernel": "other"},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"quantization": "int8"},
        {"quantization": "int3"},
        {"digests": {}},
        {"digests": [1]},
    ],
    ids=str,
)
def test_edited_packs_are_refused(change: dict[str, object], sealed: bool, pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(96, 64)).save(file)
    rewrite(file, change, sealed=sealed)
    with pytest.raises(DamagedPack, match="is damaged or edited"):
        References.load(file)


@pytest.mark.parametrize("change", [{"prefill_seconds": 5.0}, {"weights": "w"}], ids=str)
def test_headers_are_those_that_were_written(change: dict[str, object], pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(96, 64)).save(file)
    rewrite(file, change, sealed=False)
    for read in (References.load, read_identity):
        with pytest.raises(DamagedPack, match="header: not the one that was written"):
            read(file)


def test_damaged_headers_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    tensors = rewrite(file, {}, sealed=True)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors | {"1.k": torch.zeros(1, 3, 2, 16)}, file, metadata=metadata)
    with pytest.raises(DamagedPack, match=r"the bytes of 1\.k are not those that were written"):
        References.load(file)
    save_file(tensors, file, metadata=metadata | {"limner.references": "{"})
    with pytest.raises(DamagedPack, match="is damaged or edited"):
        References.load(file)
    whole = file.read_bytes()
    for damaged in (b"", b"abc", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", whole[:100], b"[" * 100_000):
        file.write_bytes(damaged)
        with pytest.raises(DamagedPack):
            References.load(file)


def test_what_was_checked_does_not_change_with_the_file(pipe: Pipeline, tmp_path: Path) -> None:
    """Written over in place, then truncated: memory that is mapped from the file would follow, or kill the process."""
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    loaded = References.load(file)
    before = [x.clone() for layer in loaded.layers for x in layer]
    with file.open("rb+") as opened:
        opened.write(b"\x7f" * os.fstat(opened.fileno()).st_size)
        opened.flush()
        assert all(map(torch.equal, before, (x for layer in loaded.layers for x in layer)))
        opened.truncate(0)
    assert all(map(torch.equal, before, (x for layer in loaded.layers for x in layer)))


def test_packs_are_safetensors_that_others_may_read(pipe: Pipeline, tmp_path: Path) -> None:
    refs, file = pipe.prefill(picture(64, 64)), tmp_path / "pack.safetensors"
    umask = os.umask(0o022)
    try:
        refs.save(file)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    with safe_open(file, framework="pt") as opened:
        assert sorted(opened.keys()) == sorted(f"{i}.{name}" for i in range(5) for name in "kv")
        assert torch.equal(opened.get_tensor("4.v"), refs.layers[4].v)


@pytest.mark.parametrize("where", [-1, 5000])
def test_a_flipped_byte_is_found(where: int, pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidRequest, match="damaged|cannot be read"):
        References.load(file)


def test_bytes_after_the_last_tensor_are_damage(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    refs = pipe.prefill(picture(64, 64))
    refs.save(path)
    assert References.load(path).key == refs.key
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(DamagedPack, match="does not end with its last tensor"):
        References.load(path)
