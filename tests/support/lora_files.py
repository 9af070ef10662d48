"""Tiny LoRAs for tests, of matrices of the original layout, in every dialect, and what they do to a transformer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from limner import Pipeline
from limner.model.lora import Kronecker, LowRank, matrix_shapes
from limner.tokens import image_ids, text_ids

WIDTH, MLP, IN, TEXT = 32, 96, 16, 48
SHAPES = {
    **{f"double_blocks.{i}.{s}_attn.qkv": (3 * WIDTH, WIDTH) for i in range(2) for s in ("img", "txt")},
    **{f"double_blocks.{i}.{s}_attn.proj": (WIDTH, WIDTH) for i in range(2) for s in ("img", "txt")},
    **{f"double_blocks.{i}.{s}_mlp.0": (2 * MLP, WIDTH) for i in range(2) for s in ("img", "txt")},
    **{f"double_blocks.{i}.{s}_mlp.2": (WIDTH, MLP) for i in range(2) for s in ("img", "txt")},
    **{f"single_blocks.{i}.linear1": (3 * WIDTH + 2 * MLP, WIDTH) for i in range(3)},
    **{f"single_blocks.{i}.linear2": (WIDTH, WIDTH + MLP) for i in range(3)},
    "img_in": (WIDTH, IN),
    "txt_in": (WIDTH, TEXT),
    "time_in.in_layer": (WIDTH, 32),
    "time_in.out_layer": (WIDTH, WIDTH),
    "final_layer.linear": (IN, WIDTH),
}
"""Matrices (N, K) of the transformer of the tiny folder, by their original names: those that all dialects know."""
OTHERS = {
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    "double_stream_modulation_img.lin": (6 * WIDTH, WIDTH),
    "double_stream_modulation_txt.lin": (6 * WIDTH, WIDTH),
    "single_stream_modulation.lin": (3 * WIDTH, WIDTH),
}
"""Those that kohya's dialect does not know."""

Pairs = dict[str, tuple[Tensor, Tensor]]


def make_pairs(seed: int = 0, *, rank: int = 4, size: float = 0.3, names: Iterable[str] = (*SHAPES, *OTHERS)) -> Pairs:
    """Random (down (R, K), up (N, R)) by the original name of their matrix; their product is `size` times as large as it."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name in names:
        num_out, num_in = (SHAPES | OTHERS)[name]
        down = torch.randn(rank, num_in, generator=generator) * num_in**-0.5
        made[name] = down, torch.randn(num_out, rank, generator=generator) * size * rank**-0.5
    return made


def original(pairs: Pairs, *, alpha: float | None = None, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    found = {}
    for name, (down, up) in pairs.items():
        found |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


def of_attention(pipe: Pipeline, seed: int) -> dict[str, Tensor]:
    """A LoRA of every matrix of attention of any pipeline, by the names of diffusers."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    for name, (num_out, num_in) in matrix_shapes(pipe.transformer).items():
        if "attn" in name:
            made[f"transformer.{name}.lora_A.weight"] = torch.randn(2, num_in, generator=generator) * num_in**-0.5
            made[f"transformer.{name}.lora_B.weight"] = torch.randn(num_out, 2, generator=generator) * 0.5
    return made


def peft(pairs: Pairs) -> dict[str, Tensor]:
    return original(pairs, prefix="base_model.model.")


def kohya(pairs: Pairs, *, alpha: float | None = None) -> dict[str, Tensor]:
    found = {}
    for name, (down, up) in pairs.items():
        module = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        if alpha is not None:
            found[f"{module}.alpha"] = torch.tensor(alpha)
    return found


def diffusers_names(pairs: Pairs, *, prefix: str = "transformer.") -> dict[str, Tensor]:
    """By the names of diffusers: the rows of a fused matrix become those of three."""
    found = {}
    for name, value in split({name: up for name, (_, up) in pairs.items()}).items():
        found[f"{prefix}{name}.lora_B.weight"] = value
    for name, value in split({name: down for name, (down, _) in pairs.items()}, copies=True).items():
        found[f"{prefix}{name}.lora_A.weight"] = value
    return found


def deltas(pairs: Pairs, *, scale: float = 1.0) -> dict[str, Tensor]:
    """What each matrix of the transformer gains, by the names of diffusers, in float64."""
    return split({name: scale * up.double() @ down.double() for name, (down, up) in pairs.items()})


def split(values: dict[str, Tensor], *, copies: bool = False) -> dict[str, Tensor]:
    """Matrices of the original layout as diffusers reads them from a checkpoint; `copies`: rows are shared, not divided.

    This is the converter of whole checkpoints, which has nothing to do with those of LoRAs.
    """
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    def rows(name: str, value: Tensor) -> Tensor:
        if not copies:
            return value
        half = name == "final_layer.adaLN_modulation.1"
        return value.repeat(3 if ".qkv" in name else 2 if half else 1, 1)

    checkpoint = {f"{name}.weight": rows(name, value) for name, value in values.items()}
    found = convert_flux2_transformer_checkpoint_to_diffusers(checkpoint)
    if copies and "norm_out.linear.weight" in found:
        found["norm_out.linear.weight"] = values["final_layer.adaLN_modulation.1"]
    return {name.removesuffix(".weight"): value.clone() for name, value in found.items()}


def kron_tensors(*, rows: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LoKr of some original matrices, one with a decomposed factor and an alpha, and what they make."""
    torch.manual_seed(0)
    tensors, whole = {}, {}
    for name, (num_out, num_in) in {
        name: (SHAPES | OTHERS)[name]
        for name in (
            "double_blocks.0.img_attn.qkv",
            "double_blocks.1.txt_attn.qkv",
            "single_blocks.2.linear1",
            "img_in",
            "final_layer.adaLN_modulation.1",
        )
    }.items():
        left, right = torch.randn(rows, 4) * 0.3, torch.randn(num_out // rows, num_in // 4) * 0.2
        module = f"diffusion_model.{name}"
        if "single" in name:
            a, b = torch.randn(num_out // rows, 2) * 0.3, torch.randn(2, num_in // 4) * 0.2
            tensors |= {f"{module}.lokr_w2_a": a, f"{module}.lokr_w2_b": b, f"{module}.alpha": torch.tensor(1.0)}
            right = 0.5 * a @ b
        else:
            tensors[f"{module}.lokr_w2"] = right
        tensors[f"{module}.lokr_w1"] = left
        whole[name] = torch.kron(left.double(), right.double())
    return tensors, split(whole)


def dense(update: LowRank | Kronecker) -> Tensor:
    """What an update adds to its matrix, in float64."""
    weight = torch.zeros(update.shape, dtype=torch.float64)
    update.add_to(weight, 1.0)
    return weight


def write(tmp_path: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors", **metadata: str) -> Path:
    """A file of tensors, with `metadata` in its header."""
    file = tmp_path / name
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file, metadata=metadata)
    return file


def velocity(pipe: Pipeline) -> Tensor:
    """Of random tokens, without references."""
    generator = torch.Generator().manual_seed(3)
    img, txt = torch.randn(1, 12, 16, generator=generator), torch.randn(1, 5, 48, generator=generator)
    with torch.no_grad():
        return pipe.transformer(
            img.to(pipe.dtype), txt.to(pipe.dtype), 0.7, img_ids=image_ids((3, 4)), txt_ids=text_ids(5)
        )


EVERYWHERE = make_pairs(names=SHAPES)
"""A LoRA of the matrices that all dialects know."""
PAIRS = make_pairs()
"""A LoRA of every matrix."""
QKV = "double_blocks.0.img_attn.qkv"
ONE = {QKV: PAIRS[QKV]}
"""A LoRA of one fused matrix."""
