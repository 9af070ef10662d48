"""Every dialect of LoRA files says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.lora_files import (
    EVERYWHERE,
    PAIRS,
    Pairs,
    deltas,
    dense,
    diffusers_names,
    kohya,
    kron_tensors,
    original,
    peft,
    write,
)
from torch import Tensor

from limner.weights.lora import load_lora

DIALECTS: dict[str, tuple[Callable[[], dict[str, Tensor]], Pairs, float]] = {
    "diffusers": (lambda: diffusers_names(PAIRS), PAIRS, 1.0),
    "bare": (lambda: diffusers_names(PAIRS, prefix=""), PAIRS, 1.0),
    "diffusers in the original prefix": (lambda: diffusers_names(PAIRS, prefix="diffusion_model."), PAIRS, 1.0),
    "original": (lambda: original(PAIRS), PAIRS, 1.0),
    "original with alpha": (lambda: original(PAIRS, alpha=2.0), PAIRS, 0.5),
    "original with down and up": (
        lambda: {k.replace("_A.", "_down.").replace("_B.", "_up."): v for k, v in original(PAIRS, alpha=3.0).items()},
        PAIRS,
        0.75,
    ),
    "PEFT": (lambda: peft(PAIRS), PAIRS, 1.0),
    "PEFT of diffusers' network": (lambda: diffusers_names(PAIRS, prefix="base_model.model."), PAIRS, 1.0),
    "kohya": (lambda: kohya(EVERYWHERE), EVERYWHERE, 1.0),
    "kohya with alpha": (lambda: kohya(EVERYWHERE, alpha=1.0), EVERYWHERE, 0.25),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(dialect: str, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """Against products of the original matrices, split by the converter of checkpoints."""
    make, pairs, scale = DIALECTS[dialect]
    expected = deltas(pairs, scale=scale)
    found = load_lora(write(tmp_path, make()), shapes=shapes)
    assert found.unknown == ()
    assert set(found.updates) == set(expected)
    for name, update in found.updates.items():
        torch.testing.assert_close(dense(update), expected[name], rtol=1e-12, atol=1e-15)
    assert load_lora(make(), shapes=shapes).digest == found.digest  # tensors instead of a file
    assert load_lora({k: v * 1.001 for k, v in make().items()}, shapes=shapes).digest != found.digest


def test_all_matrices_of_the_transformer_are_known(shapes: dict[str, tuple[int, int]]) -> None:
    assert set(deltas(PAIRS)) == set(shapes)


def test_a_kohya_file_of_blocks_of_zeros(shapes: dict[str, tuple[int, int]]) -> None:
    """q, k and v were trained apart and joined: `up` has a block for each, and the scale is that of all ranks."""
    up = torch.zeros(96, 6)
    for i in range(3):
        up[32 * i : 32 * i + 32, 2 * i : 2 * i + 2] = torch.randn(32, 2)
    pairs = {"double_blocks.1.txt_attn.qkv": (torch.randn(6, 32), up)}
    found = load_lora(kohya(pairs, alpha=3.0), shapes=shapes)
    assert {update.down.shape[0] for update in found.updates.values()} == {2}  # diffusers takes the zeros out
    for name, expected in deltas(pairs, scale=0.5).items():
        torch.testing.assert_close(dense(found.updates[name]), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_not_rounded_again(dtype: torch.dtype, shapes: dict[str, tuple[int, int]]) -> None:
    """alpha / rank of 1/3 would round every value, if it were multiplied into the tensors."""
    pairs = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in EVERYWHERE.items()}
    wide = {name: (down.float(), up.float()) for name, (down, up) in pairs.items()}
    for make in (kohya, original):
        found = load_lora(make(pairs, alpha=4 / 3), shapes=shapes)
        for name, expected in deltas(wide, scale=torch.tensor(4 / 3).item() / 4).items():
            torch.testing.assert_close(dense(found.updates[name]), expected, rtol=1e-12, atol=1e-15)


def test_lokr(shapes: dict[str, tuple[int, int]]) -> None:
    """A Kronecker product over a fused q, k, v: rows of the whole, exactly."""
    tensors, expected = kron_tensors()
    found = load_lora(tensors, shapes=shapes)
    assert set(found.updates) == set(expected)
    for name, update in found.updates.items():
        torch.testing.assert_close(dense(update), expected[name], rtol=1e-6, atol=1e-8)


def test_lokr_of_other_trainers(shapes: dict[str, tuple[int, int]]) -> None:
    left, right = torch.randn(4, 4), torch.randn(8, 8)
    for module in ("lycoris_transformer_blocks_1_attn_to_q", "transformer_blocks.1.attn.to_q"):
        tensors = {f"{module}.lokr_w1": left, f"{module}.lokr_w2": right, f"{module}.alpha": torch.tensor(1.0)}
        (name, update), *others = load_lora(tensors, shapes=shapes).updates.items()
        assert (name, others) == ("transformer_blocks.1.attn.to_q", [])
        torch.testing.assert_close(dense(update), torch.kron(left, right).double())
