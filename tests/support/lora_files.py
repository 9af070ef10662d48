"""Tiny LoRAs for tests, of matrices of the original layout, in every dialect."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

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
