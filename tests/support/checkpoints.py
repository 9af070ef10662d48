"""Small files of every layout, made from a network's tensors in words of the tests' own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner import Pipeline
from limner.weights.files import dtype_name
from tests.support.tiny import generators, picture

TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"
VAE = Path("vae") / "diffusion_pytorch_model.safetensors"
TEXT = Path("text_encoder") / "model.safetensors"
INSIDE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {"to_qkv_mlp_proj": "linear1", "to_out": "linear2", "norm_q": "norm.query_norm", "norm_k": "norm.key_norm"}
TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}


def original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers transformer as the original single file: names, fused q, k and v, the last modulation's halves."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            found[f"{TOP[stem]}.weight"] = value
        elif stem == "norm_out.linear":
            half = value.shape[0] // 2
            found["final_layer.adaLN_modulation.1.weight"] = torch.cat([value[half:], value[:half]])
        elif match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", stem):
            block, inside = f"double_blocks.{match[1]}", match[2]
            if inside in INSIDE:
                found[f"{block}.{INSIDE[inside]}.{'scale' if 'norm' in inside else 'weight'}"] = value
            elif inside == "attn.to_q":
                rest = [state[name.replace("to_q", other)] for other in ("to_k", "to_v")]
                found[f"{block}.img_attn.qkv.weight"] = torch.cat([value, *rest])
            elif inside == "attn.add_q_proj":
                rest = [state[name.replace("add_q", other)] for other in ("add_k", "add_v")]
                found[f"{block}.txt_attn.qkv.weight"] = torch.cat([value, *rest])
        elif match := re.fullmatch(r"single_transformer_blocks\.(\d+)\.attn\.(.*)", stem):
            inside = SINGLE[match[2]]
            found[f"single_blocks.{match[1]}.{inside}.{'scale' if 'norm' in inside else 'weight'}"] = value
    return found


def quantized_matrix(name: str, value: Tensor) -> bool:
    return value.dim() == 2 and re.match(r"(double_blocks|single_blocks|layers|model\.layers)\.", name) is not None


def fp8(
    tensors: Mapping[str, Tensor], *, scale: str = "weight_scale", per_row: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file with fp8 matrices, scales and markers; and what it stands for, in bfloat16."""
    stored: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not quantized_matrix(name, value):
            stored[name] = wide[name] = value.bfloat16()
            continue
        stem = name.removesuffix(".weight")
        factor = value.abs().amax(dim=1, keepdim=True) / 448 if per_row else value.abs().max() / 448
        stored[name] = (value / factor).to(torch.float8_e4m3fn)
        stored[f"{stem}.{scale}"] = factor
        stored[f"{stem}.{'input_scale' if scale == 'weight_scale' else 'scale_input'}"] = torch.tensor(0.5)
        wide[name] = (stored[name].float() * factor).bfloat16()
    stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return stored, wide


def original_vae(state: Mapping[str, Tensor], *, levels: int = 4) -> dict[str, Tensor]:
    """A diffusers autoencoder as `ae.safetensors`."""
    found = {}
    for name, value in state.items():
        new = name
        if match := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.", name):
            level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
            new = f"{match[1]}.{match[2]}.{level}.{name[match.end() :]}"
        for old, other in (
            ("resnets.", "block."),
            ("conv_shortcut", "nin_shortcut"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_norm_out", "norm_out"),
            ("mid_block.block.0", "mid.block_1"),
            ("mid_block.block.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
        ):
            new = new.replace(old, other)
        if new.startswith(("quant_conv", "post_quant_conv")):
            new = ("encoder." if new.startswith("quant") else "decoder.") + new
        if "attn_1." in new and value.dim() == 2:
            value = value[:, :, None, None]
        found[new] = value.contiguous()
    return found


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_file(path).items()}


def save(tensors: Mapping[str, Tensor], path: Path, *, prefix: str = "", **metadata: str) -> Path:
    save_file(
        {prefix + name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata=metadata or None
    )
    return path


def gguf_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random blocks of a format: any bytes are values, but the scales have to be finite halves."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    halves = {
        "Q8_0": [0],
        "Q4_0": [0],
        "Q5_1": [0, 2],
        "Q4_K": [0, 2],
        "Q5_K": [0, 2],
        "Q6_K": [208],
        "Q2_K": [80, 82],
        "Q3_K": [108],
    }[kind]
    for at in halves:
        values = rng.uniform(0.0005, 0.002, data.shape[:-1]).astype(np.float16)
        data[..., at : at + 2] = values[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def save_gguf(
    tensors: Iterable[tuple[str, Tensor]],
    path: Path,
    *,
    kind: str,
    architecture: str = "flux",
    plain: str = "F32",
    header: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file: matrices of blocks in `kind`, the rest in `plain`. Formats without a quantizer get random blocks."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    for key, said in (header or {}).items():
        getattr(writer, f"add_{kinds[type(said)]}")(key, said)
    rng = np.random.default_rng(0)
    for name, value in tensors:
        chosen = kind if quantized_matrix(name.replace("blk.", "layers."), value) else plain
        quant = gguf.GGMLQuantizationType[chosen]
        array = value.float().numpy()
        if chosen in ("Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K"):
            data = gguf_blocks(chosen, tuple(value.shape), rng)
        else:
            data = gguf.quants.quantize(array, quant)
        writer.add_tensor(name, data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sparse(tensors: dict[str, Tensor], path: Path) -> Path:
    """A safetensors file of these shapes whose data are a hole: gigabytes of no disk."""
    header, end = {}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": dtype_name(value.dtype),
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to rounding: the last bits of a product depend on where in its page a mapped weight starts."""
    assert (ours - theirs).abs().max() < 1e-5


def draw(pipe: Pipeline) -> Tensor:
    """The picture of one edit."""
    pictures: Tensor = pipe(
        "a dog", image=picture(64, 64), generator=generators(1)[0], height=64, width=64, output_type="pt"
    ).images
    return pictures
