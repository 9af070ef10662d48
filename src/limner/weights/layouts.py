"""Which layout a file of weights is in, read from its header.

Layouts of the transformer: diffusers' names (also with Limner's int8), the original single file, the same under a prefix
(ComfyUI), either with fp8 matrices and their scales, GGUF. Of the autoencoder: diffusers' and the original's names. Of the
text encoder: Qwen3 in transformers' names (fp8 as well), with or without a prefix, and GGUF. Anything else is refused
with the reason. Reads no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from limner.errors import CheckpointError
from limner.weights.files import WIDE, SafetensorsFile, TensorFile, TensorInfo, check_regular
from limner.weights.gguf import QUANTIZED, GgufFile
from limner.weights.names import IDENTITY, Names, autoencoder_names, gguf_text_names, transformer_names

__all__ = ["PARTS", "Layout", "layout_of", "naming_of", "open_file", "parts_of", "recognise"]

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
_FOREIGN = (
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
)
_ARCHITECTURES = {"transformer": ("flux", "flux2", ""), "text_encoder": ("qwen3",)}
_SCALE_NAMES = ("weight_scale", "scale_weight")
_UNUSED = ("input_scale", "scale_input", "comfy_quant")
_FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One part of a model in a file.

    `names` maps each tensor of the network to the file. `tensors` are the part's, without `prefix`. `scales` has the
    scale of each quantized weight, `unused` what else a quantization stores (scales of activations, markers).
    `quantization` is None, "fp8", "gguf" or "int8".
    """

    part: str
    naming: str
    prefix: str
    names: Names
    quantization: str | None
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, str]
    unused: tuple[str, ...]
    gguf: bool = False

    @property
    def kind(self) -> str:
        """The layout in one word: "gguf", "fp8", "int8", "comfyui", "original" or "diffusers"."""
        if self.gguf:
            return "gguf"
        if self.quantization:
            return self.quantization
        return "comfyui" if self.prefix and self.naming == "original" else self.naming


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
    scales, unused = {}, []
    for name in list(own):
        stem, _, last = name.rpartition(".")
        if last in _SCALE_NAMES and f"{stem}.weight" in own:
            scales[f"{stem}.weight"] = name
        elif last in _UNUSED or name == "scaled_fp8":
            unused.append(name)
    tensors = {name: info for name, info in own.items() if name not in unused and name not in scales.values()}
    quantization = _quantization(file, prefix, own, tensors, scales)
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
        scales=scales,
        unused=tuple(unused),
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
        for pattern, reason in _FOREIGN:
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


def _quantization(
    file: TensorFile,
    prefix: str,
    own: Mapping[str, TensorInfo],
    tensors: Mapping[str, TensorInfo],
    scales: Mapping[str, str],
) -> str | None:
    """Return how the weights of a part are quantized. Raises `CheckpointError` for what would be read wrongly."""
    found: set[str] = set()
    for name, info in tensors.items():
        where = f"{file.path}: {prefix}{name}"
        rows = info.shape[0] if info.shape else 1
        scale = own[scales[name]] if name in scales else None
        if scale is not None and scale.shape not in ((), (1,), (rows,), (rows, 1)):
            raise CheckpointError(
                f"{file.path}: {prefix}{scales[name]} is {list(scale.shape)}; allowed: one number, or one for each of the "
                f"{rows} rows"
            )
        if scale is not None and scale.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{file.path}: {prefix}{scales[name]} is {scale.dtype}; allowed: F32, F16, BF16")
        if info.dtype in _FP8:
            if scale is None:
                raise CheckpointError(
                    f"{where} is {info.dtype} without a scale ({_stem(name)}.weight_scale); its values would be off by "
                    "that factor; take a file with scales, or the bfloat16 weights"
                )
            found.add("fp8")
        elif info.dtype == "I8":
            if scale is None or scale.shape != (rows,):
                raise CheckpointError(
                    f"{where} is I8 without one weight_scale for each of its {rows} rows: not Limner's int8; take a file "
                    "of another format"
                )
            found.add("int8")
        elif info.dtype in QUANTIZED:
            found.add("gguf")
        elif scale is not None:
            raise CheckpointError(
                f"{where} is {info.dtype} and has a scale, {scales[name]}; the file is of an unknown kind"
            )
        elif info.dtype not in (*WIDE, "I64"):
            raise CheckpointError(
                f"{where} is {info.dtype}, which is not read (NVFP4, MXFP4 and other packings neither); allowed: F32, F16, "
                "BF16, F8_E4M3 with scales, GGUF"
            )
    if len(found) > 1:
        raise CheckpointError(f"{file.path}: mixes {' and '.join(sorted(found))}; the file is of an unknown kind")
    return found.pop() if found else None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
