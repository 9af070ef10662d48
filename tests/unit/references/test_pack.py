"""The pack file: what is read back, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.support.tiny import picture

from limner import CapacityError, InvalidRequest, OutputError, Pipeline, References
from limner.references import DamagedPack, pack, read_identity
from limner.store import ReferenceStore


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
        {"reports": [REPORT | {"origin": [8, 0], "digest": "0" * 64}]},
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
    save_file(tensors | {"1.k": torch.zeros_like(tensors["1.k"])}, file, metadata=metadata)
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


def change_header(file: Path, change: Callable[[dict[str, Any]], None], *, data: bytes | None = None) -> None:
    """Edits the header of a pack as it stands in the file; the identity keeps its own digest."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + (raw[start:] if data is None else data))


def set_entry(name: str, **values: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


MALFORMED_HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "zero and huge sides": set_entry("0.k", shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "huge sides": set_entry("0.k", shape=[1, 2**40, 2**40, 2**40]),
    "sides of thousands of digits": set_entry("0.k", shape=[1, 10**4000, 1, 1]),
    "negative side": set_entry("0.k", shape=[1, -16, -2, 16]),
    "sides of true": set_entry("0.k", shape=[True, True, True, True]),
    "no sides": set_entry("0.k", shape=[]),
    "thousands of sides": set_entry("0.k", shape=[1] * 10_000),
    "shape of text": set_entry("0.k", shape="abcd"),
    "other heads than the rest": set_entry("0.k", shape=[1, 16, 1, 32]),
    "other tokens": set_entry("0.k", shape=[1, 8, 4, 16]),
    "dtype": set_entry("0.k", dtype="F64"),
    "unknown dtype": set_entry("0.k", dtype="F4"),
    "dtype of list": set_entry("0.k", dtype=[]),
    "offsets beyond the file": set_entry("0.k", data_offsets=[0, 2**62]),
    "reversed offsets": set_entry("0.k", data_offsets=[2048, 0]),
    "three offsets": set_entry("0.k", data_offsets=[0, 1, 2]),
    "overlap": lambda header: header["1.k"].update(data_offsets=header["0.k"]["data_offsets"]),
    "every tensor the same bytes": lambda header: [
        header[name].update(data_offsets=header["0.k"]["data_offsets"]) for name in header if name != "__metadata__"
    ],
    "no entry": lambda header: header.update({"0.k": None}),
    "a tensor too many": lambda header: header.update({"5.k": header["0.k"]}),
    "a tensor too few": lambda header: header.pop("4.v"),
    "another name": lambda header: header.update({"05.v": header.pop("4.v")}),
    "metadata of text": lambda header: header.update(__metadata__="x"),
    "metadata of list": lambda header: header.update(__metadata__=[1]),
}


@pytest.mark.parametrize("change", MALFORMED_HEADERS.values(), ids=MALFORMED_HEADERS.keys())
def test_the_structure_is_checked_before_memory_is_taken(
    change: Callable[[dict[str, Any]], None], pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    change_header(file, change)

    def empty(*args: object, **options: object) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(pack.torch, "empty", empty)
    with pytest.raises(DamagedPack) as caught:
        References.load(file)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 2**40},
        {"num_layers": 10**4000},
        {"prefill_seconds": 1e300},
        {"prefill_seconds": 10**4000},
        {"reports": [REPORT | {"processed_size": [10**4000, 10**4000], "digest": "0" * 64}]},
        {"reports": [REPORT | {"processed_size": [2**40, 2**40], "digest": "0" * 64}]},
        {"reports": {"a": 1}},
        {"kernel": "\ud800"},
        {"shard": [1, 1]},
        {"format": "x" * 10_000},
    ],
    ids=lambda change: f"{change}"[:60],
)
def test_huge_numbers_of_the_identity_are_damage(change: dict[str, object], pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    rewrite(file, change, sealed=True)
    with pytest.raises(DamagedPack) as caught:
        References.load(file)
    str(caught.value).encode()


def test_a_long_header_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MiB of empty objects would be half a gigabyte of dicts."""
    file = tmp_path / "pack.safetensors"
    text = b"[" + b"{}," * (16 << 20 >> 2) + b"{}]"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    monkeypatch.setattr(pack.json, "loads", lambda text: pytest.fail("the header was parsed"))
    for read in (References.load, read_identity):
        with pytest.raises(DamagedPack, match=f"its header has {len(text)} bytes, at most {pack.LONGEST_HEADER}"):
            read(file)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pack.safetensors")
    for read in (References.load, read_identity):
        with pytest.raises(InvalidRequest, match="no regular file"):
            read(tmp_path / "pack.safetensors")


def test_a_sound_pack_that_does_not_fit_in_memory_is_no_damage(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore(disk_path=tmp_path)
    refs = pipe.prefill(picture(64, 64))
    refs.save(file := tmp_path / f"{refs.key}.safetensors")

    def empty(*args: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pack.torch, "empty", empty)
    with pytest.raises(CapacityError, match=r"needs \d+ bytes for 0\.k"):
        References.load(file)
    assert "memory has no room" in (store.verify()[refs.key] or "")
    assert file.exists()


def test_a_malformed_pack_is_dropped_and_made_again(pipe: Pipeline, tmp_path: Path) -> None:
    refs = pipe.prefill(picture(64, 64))
    refs.save(file := tmp_path / f"{refs.key}.safetensors")
    change_header(file, MALFORMED_HEADERS["zero and huge sides"])
    store = ReferenceStore(disk_path=tmp_path)
    assert "is not a count" in (store.verify()[refs.key] or "")
    assert store.find(refs.key) is None
    assert not file.exists()
    store.put(refs)
    store.flush()
    assert store.verify() == {refs.key: None}
