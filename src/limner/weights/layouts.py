"""Which layout a file of weights is in, read from its header.

Layouts of the transformer: diffusers' names, the original single file, the same under a prefix (ComfyUI), GGUF. Of the
autoencoder: diffusers' and the original's names. Of the text encoder: Qwen3 in transformers' names, with or without a
prefix, and GGUF. Weights may be wide or in a format of `packing`. Anything else is refused with the reason. Reads no
tensors but markers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from limner.errors import CheckpointError
from limner.weights.files import WIDE, SafetensorsFile, TensorFile, TensorInfo, check_regular
from limner.weights.gguf import QUANTIZED, GgufFile
from limner.weights.names import IDENTITY, Names, Rule, autoencoder_names, gguf_text_names, transformer_names
from limner.weights.packing import Packing, is_extra, packings_of

__all__ = ["FOREIGN", "PARTS", "QUANTIZED_BY", "Layout", "layout_of", "naming_of", "open_file", "parts_of", "recognise"]

PARTS = ("transformer", "vae", "text_encoder")
_PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
    "vae": ("", "vae.", "first_stage_model."),
    "text_encoder": ("model.", "", "text_encoder.model."),
}
_COMFY_TEXT = re.compile(r"(text_encoders\.\w+\.(?:transformer\.)?model\.)embed_tokens\.weight")
_SIGNATURES = {
    ("transformer", "original"): (
        "single_stream_modulation.lin.weight",
        "double_stream_modulation_img.lin.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.0.linear1.weight",
    ),
    ("transformer", "diffusers"): (
        "single_stream_modulation.linear.weight",
        "double_stream_modulation_img.linear.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    ),
    ("vae", "original"): ("decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"),
    ("vae", "diffusers"): (
        "decoder.up_blocks.0.resnets.0.conv1.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
    ),
    ("text_encoder", "diffusers"): ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight"),
    ("text_encoder", "gguf"): ("token_embd.weight", "blk.0.attn_q_norm.weight"),
}
"""Tensors that identify a layout. Any of them is enough, so that a damaged file is still recognised."""
FOREIGN = (
    (
        r"guidance_in\.in_layer\.weight|time_guidance_embed\.guidance_embedder\..*",
        "has a guidance embedding (a guidance-distilled model, FLUX.2-dev-like); only klein-like models are supported",
    ),
    (
        r"double_blocks\.\d+\.img_mod\.lin\.weight|vector_in\..*|transformer_blocks\.\d+\.norm1\.linear\.weight",
        "is of FLUX.1, whose blocks have modulations of their own; only klein-like models of FLUX.2 are supported",
    ),
    (
        r".*(\.lora_(A|B|down|up)\.|\.lora\.(down|up)\.|\.lokr_w|\.hada_w).*",
        "is a LoRA, not a model; give it as a LoRA",
    ),
    (
        r"(?:decoder\.)?(?:layers\.)?\d+\.conv\.0\.weight",
        "is a small decoder for previews, as TAEF2; give it as preview_decoder (--preview-decoder)",
    ),
)
QUANTIZED_BY = (
    (r"weight\.(absmax|quant_map|quant_state\..*|nested_absmax|nested_quant_map)|SCB", "bitsandbytes"),
    (r"weight_(packed|global_scale|zero_point)|input_global_scale", "compressed-tensors"),
    (r"qweight|qzeros|wscales|wzeros|proj_(down|up)|smooth_factor(_orig)?", "GPTQ, AWQ or Nunchaku"),
    (r"pre_quant_scale|smooth_scale", "a smoothing of activations (pre_quant_scale), which is not undone"),
    (r"weight_scalar", "a hybrid of MXFP8 and fp8"),
)
"""Tensors by which a quantization that is not read is known."""
_ARCHITECTURES = {"transformer": ("flux", "flux2", ""), "text_encoder": ("qwen3",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One part of a model in a file.

    `names` maps each tensor of the network to the file. `tensors` are the part's weights, without `prefix`, with the shapes
    that they have when they are read. `packings` says how each narrow one is stored, `unused` what else a quantization
    stores (scales of activations, markers). `quantization` is None, "gguf", or the names of formats, joined by "+".
    """

    part: str
    naming: str
    prefix: str
    names: Names
    quantization: str | None
    tensors: Mapping[str, TensorInfo]
    packings: Mapping[str, Packing]
    unused: tuple[str, ...]
    gguf: bool = False

    @property
    def kind(self) -> str:
        """The layout in one word: "gguf", a format of `packing`, "comfyui", "original" or "diffusers"."""
        if self.gguf:
            return "gguf"
        if self.quantization:
            return self.quantization
        return "comfyui" if self.prefix and self.naming == "original" else self.naming

    @property
    def scales(self) -> tuple[str, ...]:
        """The names of all scales of weights."""
        return tuple(name for packing in self.packings.values() for name in packing.beside)

    def source(self, target: str | Rule) -> str | None:
        """Return the name in the file of a tensor of the network, under any of its names; None if it is not there."""
        rule = target if isinstance(target, Rule) else self.names.rule(target)
        return next((name for name in (rule.source, *rule.also) if name in self.tensors), None)


def open_file(path: Path) -> TensorFile:
    """Open a file of tensors, GGUF or safetensors by its first bytes. Raises `CheckpointError`, also for pickles."""
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(4)
    return GgufFile(path) if start == b"GGUF" or path.suffix.lower() == ".gguf" else SafetensorsFile(path)


def parts_of(file: TensorFile) -> list[str]:
    """Return the parts of a model that a file holds: some of `PARTS`."""
    return [part for part in PARTS if naming_of(file, part) is not None]


def recognise(file: TensorFile, part: str) -> Layout:
    """Return the layout of one part in a file. Raises `CheckpointError` with the reason if it is not supported."""
    found = naming_of(file, part)
    if found is None:
        others = parts_of(file)
        _refuse_foreign(file, file.infos)
        if isinstance(file, GgufFile) and file.architecture not in _ARCHITECTURES.get(part, ()):
            raise _wrong_architecture(file, part)
        holds = (
            f"a {others[0]}" if others else f"{', '.join(sorted(file.infos)[:3])} and more" if file.infos else "nothing"
        )
        raise CheckpointError(f"{file.path}: holds no {part} of a layout that is known, but {holds}")
    naming, prefix = found
    if isinstance(file, GgufFile) and file.architecture not in _ARCHITECTURES.get(part, ()):
        raise _wrong_architecture(file, part)
    return layout_of(file, part, naming=naming, prefix=prefix)


def layout_of(file: TensorFile, part: str, *, naming: str, prefix: str) -> Layout:
    """Return the layout of a part whose naming and prefix are known. Raises `CheckpointError`."""
    own = {name.removeprefix(prefix): info for name, info in file.infos.items() if name.startswith(prefix)}
    if part == "text_encoder" and prefix == "model.":
        own |= {name: info for name, info in file.infos.items() if not name.startswith(prefix)}
    if part == "transformer":
        _refuse_foreign(file, own)
    packings: dict[str, Packing] = {}
    if not isinstance(file, GgufFile):
        _refuse_quantizations(file, own)
        packings = packings_of(file, own, prefix)
    beside = {name for packing in packings.values() for name in packing.beside}
    unused = tuple(name for name in own if is_extra(name))
    tensors = {
        name: _unpacked(info, packings.get(name))
        for name, info in own.items()
        if name not in beside and not is_extra(name)
    }
    quantization = _quantization(file, prefix, tensors, packings)
    names = IDENTITY
    if naming == "original":
        levels = {match[1] for name in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
        names = transformer_names() if part == "transformer" else autoencoder_names(len(levels))
    elif naming == "gguf":
        names = gguf_text_names()
    return Layout(
        part=part,
        naming=naming,
        prefix=prefix,
        names=names,
        quantization=quantization,
        tensors=tensors,
        packings=packings,
        unused=unused,
        gguf=isinstance(file, GgufFile),
    )


def naming_of(file: TensorFile, part: str) -> tuple[str, str] | None:
    """Return (naming, prefix) of a part in a file, or None if the file does not hold it."""
    prefixes = list(_PREFIXES[part])
    if part == "text_encoder":
        prefixes += [match[1] for name in file.infos if (match := _COMFY_TEXT.fullmatch(name))]
    for (owner, naming), signature in _SIGNATURES.items():
        for prefix in prefixes if owner == part else ():
            if any(prefix + name in file.infos for name in signature):
                return naming, prefix
    return None


def _refuse_foreign(file: TensorFile, names: Iterable[str]) -> None:
    for name in names:
        for pattern, reason in FOREIGN:
            if re.fullmatch(f"(?:.*\\.)?(?:{pattern})", name):
                raise CheckpointError(f"{file.path}: {reason} (it holds {name})")


def _wrong_architecture(file: GgufFile, part: str) -> CheckpointError:
    allowed = [name for name in _ARCHITECTURES.get(part, ()) if name]
    if not allowed:
        return CheckpointError(
            f"{file.path}: is GGUF, in which a {part} is not read; give a .safetensors file or a folder"
        )
    return CheckpointError(
        f"{file.path}: general.architecture={file.architecture!r} is not that of a {part} of this family; allowed: "
        f"{', '.join(allowed)}"
    )


def _refuse_quantizations(file: TensorFile, names: Iterable[str]) -> None:
    """Refuse what tensors of other tools mark, by the tool's name."""
    for name in names:
        for pattern, tool in QUANTIZED_BY:
            if re.fullmatch(f".*\\.(?:{pattern})", name):
                raise CheckpointError(
                    f"{file.path}: is quantized by {tool}, which is not read (it holds {name}); take a file in fp8, int8, "
                    "NVFP4, MXFP8 or GGUF, or the bfloat16 weights"
                )


def _unpacked(info: TensorInfo, packing: Packing | None) -> TensorInfo:
    """Return a tensor with the shape that it stands for."""
    return info if packing is None else TensorInfo(dtype=info.dtype, shape=packing.shape, nbytes=info.nbytes)


def _quantization(
    file: TensorFile, prefix: str, tensors: Mapping[str, TensorInfo], packings: Mapping[str, Packing]
) -> str | None:
    """Return how the weights of a part are quantized. Raises `CheckpointError` for dtypes that are not read."""
    if isinstance(file, GgufFile):
        return "gguf" if any(info.dtype in QUANTIZED for info in tensors.values()) else None
    for name, info in tensors.items():
        if name not in packings and info.dtype not in (*WIDE, "I64"):
            raise CheckpointError(
                f"{file.path}: {prefix}{name} is {info.dtype}, which is not read; allowed: F32, F16, BF16, F8 and I8 with "
                "scales, marked NVFP4 and MXFP8, GGUF"
            )
    return "+".join(sorted({packing.format for packing in packings.values()})) or None
