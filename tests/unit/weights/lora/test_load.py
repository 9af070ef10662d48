"""What is refused in a LoRA, and how the message names it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.lora_files import ONE, PAIRS, QKV, diffusers_names, kohya, original, velocity, write
from torch import Tensor

from limner import CheckpointError, Pipeline
from limner.model.lora import matrix_shapes
from limner.weights.lora import load_lora


def test_unknown_tensors_are_named(pipe: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strange = {
        "diffusion_model.double_blocks.7.img_attn.qkv.lora_A.weight": torch.zeros(4, 32),
        "diffusion_model.double_blocks.999999999.img_attn.qkv.lora_A.weight": torch.zeros(4, 32),
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.zeros(8),
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16),
        "diffusion_model.guidance_in.in_layer.lora_A.weight": torch.zeros(4, 32),
    }
    file = write(tmp_path, original(PAIRS) | strange)
    with pytest.raises(CheckpointError) as error:
        pipe.load_lora_weights(file)
    for name in (str(file), *strange, "for a text encoder are not supported", "strict=False"):
        assert name in str(error.value)
    assert pipe.get_active_adapters() == []
    with caplog.at_level(logging.WARNING, "limner"):
        pipe.load_lora_weights(file, strict=False)
    assert all(name in caplog.text for name in strange)
    found = load_lora(file, shapes=matrix_shapes(pipe.transformer), strict=False)
    assert found.unknown == tuple(sorted(strange))
    assert found.digest == load_lora(original(PAIRS), shapes=matrix_shapes(pipe.transformer)).digest


def test_many_unknown_tensors_are_counted(pipe: Pipeline) -> None:
    tensors = {f"lora_unet_down_blocks_{i}_attn.lora_down.weight": torch.zeros(4, 8) for i in range(40)}
    with pytest.raises(CheckpointError, match=r"none of its 40 tensors .* and 28 more\); it is of another model"):
        pipe.load_lora_weights(tensors)


def first(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    name = next(iter(tensors))
    changed = change(tensors[name])
    return {k: v for k, v in tensors.items() if k != name} | ({} if changed is None else {name: changed})


BAD: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "wider model": (
        lambda: original({QKV: (torch.zeros(4, 64), torch.zeros(192, 4))}),
        rf"{QKV}.lora_A.weight is \[4, 64\].*\[64, 64\] for transformer_blocks.0.attn.to_[qkv], which is \[32, 32\]",
    ),
    "other kohya model": (
        lambda: kohya({QKV: (torch.zeros(4, 64), torch.zeros(192, 4))}),
        r"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight is \[4, 64\].*of another model",
    ),
    "not divisible": (
        lambda: original({QKV: (torch.zeros(4, 32), torch.zeros(95, 4))}),
        rf"{QKV}.lora_A.weight is \[4, 32\].*of another model",
    ),
    "no down": (lambda: first(original(ONE), lambda t: None), rf"{QKV}.lora_B.weight has no down \(lora_A\)"),
    "no up": (lambda: {k: v for k, v in kohya(ONE, alpha=1.0).items() if "up" not in k}, r"lora_down.weight has no up"),
    "ranks": (lambda: first(original(ONE), lambda t: t[:3]), "different ranks"),
    "not finite": (
        lambda: first(original(ONE), lambda t: t * torch.nan),
        rf"{QKV}.lora_A.weight holds values that are not",
    ),
    "integers": (lambda: first(original(ONE), lambda t: t.int()), rf"{QKV}.lora_A.weight is torch.int32"),
    "vector": (lambda: first(original(ONE), lambda t: t[0]), rf"{QKV}.lora_A.weight is torch.float32 \[32\]"),
    "alpha": (
        lambda: original(ONE) | {f"diffusion_model.{QKV}.alpha": torch.ones(2)},
        r"alpha is torch.float32 \[2\]; .*one number",
    ),
    "DoRA": (
        lambda: original(ONE) | {f"diffusion_model.{QKV}.dora_scale": torch.ones(96, 1)},
        rf"{QKV}.dora_scale: is of a DoRA",
    ),
    "DoRA of PEFT": (
        lambda: (
            diffusers_names(ONE) | {"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(32)}
        ),
        "lora_magnitude_vector: is of a DoRA",
    ),
    "bias": (
        lambda: diffusers_names(ONE) | {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": torch.ones(32)},
        "to_q.lora_B.bias: is a bias",
    ),
    "twice": (lambda: original(ONE) | diffusers_names(ONE), "are both for transformer_blocks.0.attn.to_[qkv]"),
    "LoKr without a factor": (
        lambda: {f"diffusion_model.{QKV}.lokr_w1": torch.ones(8, 4)},
        rf"{QKV}.lokr_w2: lacks 'lokr_w2_a'",
    ),
    "empty": (dict, "none of its 0 tensors"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, strict: bool, pipe: Pipeline) -> None:
    make, message = BAD[case]
    before = velocity(pipe)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(make(), strict=strict)
    assert pipe.get_list_adapters() == {}
    assert torch.equal(velocity(pipe), before)
