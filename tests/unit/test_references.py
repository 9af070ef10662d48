"""References as values: the pack file, the key, and quantized K/V."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.conftest import generators, picture

from limner import InvalidRequest, OutputError, Pipeline, References
from limner.model.kv import LayerKV, quantize_layer
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
        match=f"made with weights {pipe.reference_weights}, this pipeline has {other.reference_weights}",
    ):
        other("a dog", references=References.load(tmp_path / "pack.safetensors"))


def test_other_files_are_refused(tmp_path: Path, pipe: Pipeline) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidRequest, match="is not a reference pack"):
        References.load(tmp_path / "other.safetensors")
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "new.safetensors", metadata={"limner.references": json.dumps({"format": 99})}
    )
    with pytest.raises(InvalidRequest, match="has pack format 99, this version reads 2"):
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
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"quantization": "int8"},
        {"quantization": "int3"},
        {"digests": {}},
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
        {"quantization": "int8"},
    ]
    assert len({reference_key(**(base | change)) for change in [{}, *changes]}) == 1 + len(changes)


@pytest.mark.parametrize("where", [-1, 5000])
def test_a_flipped_byte_is_found(where: int, pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "pack.safetensors"
    pipe.prefill(picture(64, 64)).save(file)
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidRequest, match="damaged|cannot be read"):
        References.load(file)


@pytest.mark.parametrize(("kind", "error"), [("int8", 8e-3), ("fp8", 3e-2)])
def test_quantized_references(kind: str, error: float, tiny_folder: Path, tmp_path: Path) -> None:
    """Half the bytes of bfloat16 (here with a head dim of 16: 20 bytes instead of 64 in float32), a small error, and
    the same bits from a pack."""
    pictures = [picture(96, 64), picture(64, 64, seed=1)]
    plain = Pipeline.from_pretrained(tiny_folder)
    pipe = Pipeline.from_pretrained(tiny_folder, kv_cache_dtype=kind)
    exact, refs = plain.prefill(pictures), pipe.prefill(pictures)
    assert refs.quantization == kind
    assert refs.key != exact.key
    assert refs.nbytes * 64 == exact.nbytes * 20
    for one, other in zip(refs.layers, exact.layers, strict=True):
        for x, y in zip(one.dense(torch.float32), other.dense(torch.float32), strict=True):
            assert 0 < (x - y).norm() / y.norm() < error
            assert (
                (x - y).abs() <= y.abs().amax(-1, keepdim=True) * (0.5 / 127 if kind == "int8" else 1 / 16) * 1.001
            ).all()
    refs.save(tmp_path / "pack.safetensors")
    loaded = References.load(tmp_path / "pack.safetensors")

    def draw(**arguments: object) -> torch.Tensor:
        out = pipe("a dog", generator=generators(1)[0], output_type="pt", width=64, height=64, **arguments)
        images: torch.Tensor = out.images
        return images

    assert torch.equal(draw(references=refs), draw(references=loaded))
    assert torch.equal(draw(references=refs), draw(image=pictures))
    assert not torch.equal(draw(references=refs), draw(references=exact))
    assert (draw(references=refs) - draw(references=exact)).abs().mean() < 2e-2


def test_refuses_other_formats(tiny_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype: 'int4' is not one of None, 'int8', 'fp8'"):
        Pipeline.from_pretrained(tiny_folder, kv_cache_dtype="int4")


def test_rows_of_zeros_are_quantized() -> None:
    layer = quantize_layer(LayerKV(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8)), "int8")
    assert all(torch.equal(x, torch.zeros(1, 3, 2, 8)) for x in layer.dense(torch.float32))
