"""The store and the pack file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.conftest import generators, picture

from limner import InvalidRequest, OutputError, Pipeline, References, ReferenceStore
from limner.references import reference_key


def test_pack_round_trip(pipe: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    refs = pipe.prefill([picture(100, 70), picture(64, 64, seed=1)])
    refs.save(tmp_path / "pack.safetensors")
    loaded = References.load(tmp_path / "pack.safetensors")
    assert (loaded.key, loaded.weights, loaded.reports) == (refs.key, refs.weights, refs.reports)
    assert (loaded.num_tokens, loaded.nbytes, loaded.sizes) == (6 * 4 + 16, refs.nbytes, ((96, 64), (64, 64)))
    for mine, theirs in zip(refs.layers, loaded.layers, strict=True):
        assert torch.equal(mine.k, theirs.k)
        assert torch.equal(mine.v, theirs.v)
    fresh = Pipeline.from_pretrained(tiny_folder)
    pictures = [
        p("a dog", references=r, generator=generators(1)[0], output_type="pt").images
        for p, r in ((pipe, refs), (fresh, loaded))
    ]
    assert torch.equal(*pictures)


def test_pack_of_other_weights_is_refused(pipe: Pipeline, tiny_folder: Path, tmp_path: Path) -> None:
    pipe.prefill(picture(64, 64)).save(tmp_path / "pack.safetensors")
    other = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    with pytest.raises(
        InvalidRequest,
        match=f"made with weights {pipe.reference_weights[:16]}, this pipeline has {other.reference_weights[:16]}",
    ):
        other("a dog", references=References.load(tmp_path / "pack.safetensors"))


def test_other_files_are_refused(tmp_path: Path, pipe: Pipeline) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidRequest, match="is not a reference pack"):
        References.load(tmp_path / "other.safetensors")
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "new.safetensors", metadata={"limner.references": json.dumps({"format": 99})}
    )
    with pytest.raises(InvalidRequest, match="has pack format 99, this version reads 1"):
        References.load(tmp_path / "new.safetensors")
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        References.load(file)
    for path in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            References.load(path)
    with pytest.raises(OutputError, match="cannot be written"):
        pipe.prefill(picture(64, 64)).save(tmp_path / "nowhere" / "pack.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"key": "FORGED"},
        {"reports": []},
        {"reports": 5},
        {"reports": [{"more": 1}]},
        {"num_layers": 0},
        {"num_layers": 2},
        {"num_layers": "a"},
        {"weights": "0" * 64},
        {"kernel": "other"},
    ],
    ids=str,
)
def test_edited_packs_are_refused(change: dict[str, object], pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    with safe_open(file, framework="pt") as opened:
        identity = json.loads(opened.metadata()["limner.references"])
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata={"limner.references": json.dumps(identity | change)})
    if change == {"num_layers": 2}:  # whole in itself, but of another model
        with pytest.raises(InvalidRequest, match="they have 2 layers"):
            pipe("a dog", references=References.load(file))
        return
    with pytest.raises(InvalidRequest, match="is damaged or edited"):
        References.load(file)
    save_file(tensors | {"1.k": torch.zeros(1, 3, 2, 16)}, file, metadata={"limner.references": json.dumps(identity)})
    with pytest.raises(InvalidRequest, match=r"keys or values of shape \[1, 3, 2, 16\]"):
        References.load(file)
    save_file(tensors, file, metadata={"limner.references": "{"})
    with pytest.raises(InvalidRequest, match="damaged header"):
        References.load(file)


def test_key_covers_everything_that_matters() -> None:
    base = {"weights": "w", "dtype": torch.float32, "kernel": "chunked", "digests": ["a", "b"]}
    changes = [
        {"weights": "x"},
        {"dtype": torch.bfloat16},
        {"kernel": "flash"},
        {"digests": ["b", "a"]},
        {"digests": ["ab"]},
    ]
    assert len({reference_key(**(base | change)) for change in [{}, *changes]}) == 1 + len(changes)


def test_store_keeps_to_its_budget(tiny_folder: Path) -> None:
    pictures = [picture(64, 64, seed=i) for i in range(4)]
    one = Pipeline.from_pretrained(tiny_folder).prefill(pictures[0]).nbytes
    store = ReferenceStore(memory_bytes=2 * one)
    pipe = Pipeline.from_pretrained(tiny_folder, store=store)
    refs = [pipe.prefill(p) for p in pictures[:2]]
    assert pipe.prefill(pictures[0]) is refs[0]  # now the most recently used
    pipe.prefill(pictures[2])
    assert (refs[0].key in store, refs[1].key in store) == (True, False)
    assert store.nbytes == 2 * one
    assert len(store) == 2


def test_refuses_budgets() -> None:
    with pytest.raises(InvalidRequest, match="memory_bytes: -1 is not a budget"):
        ReferenceStore(memory_bytes=-1)


def test_nothing_is_kept_without_a_budget(tiny_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, store=ReferenceStore(memory_bytes=0))
    for _ in range(2):
        assert pipe("a dog", image=picture(64, 64)).reference_cache == "miss"
    assert len(pipe.store) == 0


def test_a_failed_prefill_leaves_no_entry() -> None:
    store = ReferenceStore()

    def fail() -> References:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get("key", fail)
    assert "key" not in store
