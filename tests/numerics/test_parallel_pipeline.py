"""A pipeline on two processes: as on one, with one answer of the store, and References that say which part they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.parallel_work import edit, lora, pictures, pipelines, repaint
from tests.support.processes import run_processes
from tests.support.tiny import generators, relative_error

from limner import Pipeline
from limner.errors import InvalidRequest
from limner.model.shards import MODES
from limner.references import References, read_identity

TOLERANCE = 1e-5
"""Of float32 latents, sums in another order: seen 1e-6."""


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def folder(alone: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    alone.prefill(pictures(2)).save(folder / "whole.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(alone: Pipeline, tiny_folder: Path, folder: Path) -> list[dict[Any, Any]]:
    """What each of two processes made."""
    return run_processes(pipelines, folder / "processes", tiny_folder, folder, lora(alone.transformer))


@pytest.mark.parametrize("mode", MODES)
def test_edits_as_one_process_does(mode: str, alone: Pipeline, found: list[dict[Any, Any]]) -> None:
    for number in range(4):
        expected = edit(alone, number).images
        for rank in range(2):
            for state, cache in (("cold", "miss"), ("warm", "memory")):
                made, reference_cache = found[rank][mode, number, state]
                assert reference_cache == (cache if number else "none")
                assert made.shape == (2, *expected.shape[1:])
                assert relative_error(made, expected) <= TOLERANCE
                assert torch.equal(made, found[0][mode, number, state][0])
    for rank in range(2):
        assert found[rank][mode, "digest"] == alone.digest
        seeds, images = found[rank][mode, "drawn"]
        assert seeds == found[0][mode, "drawn"][0]
        one = alone(
            "a hat",
            width=64,
            height=64,
            output_type="latent",
            max_sequence_length=40,
            num_inference_steps=1,
            generator=generators(*seeds),
        )
        assert not isinstance(one, tuple)
        assert relative_error(images, one.images) <= TOLERANCE


def test_references_say_which_part_they_are(alone: Pipeline, folder: Path, found: list[dict[Any, Any]]) -> None:
    whole = alone.prefill(pictures(2))
    keys = {whole.key}
    for rank in range(2):
        assert found[rank]["tensor", "shard"] == (rank, 2)
        assert found[rank]["tensor", "nbytes"] * 2 == whole.nbytes
        assert found[rank]["sequence", "shard"] is None
        assert found[rank]["sequence", "nbytes"] == whole.nbytes
        keys.add(found[rank]["tensor", "key"])
        part = References.load(folder / f"tensor-{rank}.safetensors")
        assert (part.shard, part.weights) == ((rank, 2), whole.weights)
        for layer, whole_layer in zip(part.layers, whole.layers, strict=True):
            assert relative_error(layer.k, whole_layer.k[:, :, rank : rank + 1]) <= TOLERANCE
        assert read_identity(folder / f"tensor-{rank}.safetensors").shard == (rank, 2)
        with pytest.raises(InvalidRequest, match=r"this pipeline has all of them"):
            alone("a hat", references=part)
    assert found[0]["sequence", "key"] == found[1]["sequence", "key"]
    assert len(keys) == 3
    assert not keys & {found[0]["sequence", "key"]}
    assert len({whole.part(0, 2).key, whole.part(1, 2).key, whole.key}) == 3
    whole.part(1, 2).check()


@pytest.mark.parametrize("mode", MODES)
def test_store_gives_all_processes_one_answer(mode: str, alone: Pipeline, found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        assert found[rank][mode, "lost"] == ("miss", "memory")
        assert found[rank][mode, "next process"] == "disk"
        made, reference_cache = found[rank][mode, "damaged"]
        assert reference_cache == "miss"
        assert relative_error(made, edit(alone, 2).images) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_whole_packs_serve_parts(mode: str, alone: Pipeline, folder: Path, found: list[dict[Any, Any]]) -> None:
    one = alone(
        "a hat",
        references=References.load(folder / "whole.safetensors"),
        width=64,
        height=64,
        output_type="latent",
        max_sequence_length=40,
        generator=generators(1),
        num_inference_steps=1,
    )
    assert not isinstance(one, tuple)
    for rank in range(2):
        assert relative_error(found[rank][mode, "whole pack"], one.images) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_loras_and_int8(mode: str, tiny_folder: Path, found: list[dict[Any, Any]]) -> None:
    one = Pipeline.from_pretrained(tiny_folder)
    plain = edit(one, 1).images
    one.load_lora_weights(lora(one.transformer))
    expected = edit(one, 1).images
    assert relative_error(plain, expected) > 100 * TOLERANCE
    narrow = Pipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16, quantize="int8", kv_cache_dtype="int8")
    rounded = relative_error(edit(narrow, 1).images, plain)
    for rank in range(2):
        assert relative_error(found[rank][mode, "lora"], expected) <= TOLERANCE
        assert relative_error(found[rank][mode, "fused"], expected) <= TOLERANCE
        images, nbytes, digest = found[rank][mode, "int8"]
        assert digest == narrow.digest
        assert nbytes * (2 if mode == "tensor" else 1) == narrow.prefill(pictures(1)).nbytes
        assert relative_error(images, plain) <= 2 * rounded
        assert all(held == used for held, used in found[rank][mode, "cast"])


@pytest.mark.parametrize("mode", MODES)
def test_masks_and_weights(mode: str, alone: Pipeline, found: list[dict[Any, Any]]) -> None:
    expected = repaint(alone).images
    assert relative_error(expected[:1], expected[1:]) > 100 * TOLERANCE
    for rank in range(2):
        assert relative_error(found[rank][mode, "repainted"], expected) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_joint_references(mode: str, tiny_folder: Path, found: list[dict[Any, Any]]) -> None:
    """Tokens of joint references are whole in every process, and drawn as by one."""
    one = Pipeline.from_pretrained(tiny_folder, references="joint")
    expected, reused = edit(one, 2).images, edit(one, 2, reuse="step0").images
    assert relative_error(reused, expected) > 10 * TOLERANCE
    for rank in range(2):
        images, shard = found[rank][mode, "joint"]
        assert shard is None
        assert relative_error(images, expected) <= TOLERANCE
        if mode == "tensor":
            assert relative_error(found[rank][mode, "reuse"], reused) <= TOLERANCE
