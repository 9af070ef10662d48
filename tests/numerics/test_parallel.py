"""One transformer on two processes against the same on one: tensor and sequence parallel, in float32 over gloo."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.parallel_work import NAMES, build, draw, inputs, loras, work
from tests.support.processes import run_processes
from tests.support.tiny import make_transformer, relative_error

from limner.config import TransformerConfig
from limner.model.divide import matrix_shards
from limner.model.int8 import quantize_blocks
from limner.model.lora import Branches
from limner.model.shards import MODES
from limner.model.transformer import Transformer

# float32 sums in another order: seen 1e-7 to 4e-7; a wrong head, block or position gives 1e-2 and more
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    theirs = make_transformer(16)
    folder = tmp_path_factory.mktemp("parallel")
    torch.save((TransformerConfig.from_diffusers(theirs.config), theirs.state_dict()), folder / "weights.pt")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[Any, Any]]:
    """What each of two processes made."""
    return run_processes(work, folder / "processes", folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Transformer:
    return build(folder).requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_two_processes_give_what_one_gives(
    mode: str, name: str, alone: Transformer, found: list[dict[Any, Any]]
) -> None:
    velocity, references = draw(alone, dict(inputs())[name])
    for rank, (theirs, their_references) in enumerate(each[mode, name] for each in found):
        assert relative_error(theirs, velocity) <= TOLERANCE
        assert torch.equal(theirs, found[0][mode, name][0])
        assert (references is None) == (their_references is None)
        if references is None:
            continue
        if mode == "tensor":
            assert their_references.nbytes * 2 == references.nbytes
        for layer, their_layer in zip(references.layers, their_references.layers, strict=True):
            heads = slice(rank, rank + 1) if mode == "tensor" else slice(None)
            for x, their_x in zip(layer, their_layer, strict=True):
                assert relative_error(their_x, x[:, :, heads]) <= TOLERANCE


@torch.no_grad()
def test_loras_are_cut_with_the_weights(alone: Transformer, found: list[dict[Any, Any]]) -> None:
    given = dict(inputs())[NAMES[-1]]
    plain = draw(alone, given)[0]
    branches = Branches(alone, loras(alone), dtype=torch.float32, device=alone.device)
    expected = draw(alone, given)[0]
    branches.remove()
    assert relative_error(plain, expected) > 0.1
    for mode, rank in itertools.product(MODES, range(2)):
        assert relative_error(found[rank][mode, "lora"], expected) <= TOLERANCE


@torch.no_grad()
def test_int8_weights_are_cut_as_they_are(folder: Path, alone: Transformer, found: list[dict[Any, Any]]) -> None:
    given = dict(inputs())[NAMES[-1]]
    int8 = build(folder)
    quantize_blocks(int8)
    expected, wide = draw(int8, given)[0], draw(alone, given)[0]
    for rank in range(2):
        # a row of activations is cut before it is quantized, each part with a scale of its own: other roundings
        assert relative_error(found[rank]["tensor", "int8"], expected) <= 2 * relative_error(expected, wide)
        assert relative_error(found[rank]["sequence", "int8"], expected) <= relative_error(expected, wide)


def test_what_is_cut_is_had_once(alone: Transformer, found: list[dict[Any, Any]]) -> None:
    config = alone.config
    cut = sum(p.numel() for n, p in alone.named_parameters() if _cut(n, config))
    whole = sum(p.numel() for n, p in alone.named_parameters()) - cut
    assert cut > whole
    for rank in range(2):
        assert found[rank]["tensor", "weights"] == whole + cut // 2
        assert found[rank]["sequence", "weights"] == whole + cut
    assert "tensor parallel 2" in found[0]["tensor", "arithmetic"]
    assert "sequence parallel 2" in found[0]["sequence", "arithmetic"]


def _cut(name: str, config: TransformerConfig) -> bool:
    return any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in matrix_shards(config))
