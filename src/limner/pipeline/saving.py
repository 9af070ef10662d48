"""Write a pipeline as a folder in the diffusers layout, from what is in memory.

The text encoder has layers in its file that no call reads and no pipeline holds; they come from where it was loaded.
Knows no calls.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any
from weakref import ReferenceType

import torch
from safetensors import safe_open

from limner.errors import CheckpointError, InvalidRequest, OutputError
from limner.weights.convert import check_int8, convert, save_network, transformer_config
from limner.weights.parts import STEMS

__all__ = ["model_index", "save"]

_logger = logging.getLogger("limner")
_AGAIN = "load the model from its folder and save that"


def model_index(pipe: Any) -> dict[str, Any]:
    """Return what `model_index.json` says of a pipeline."""
    import diffusers

    return {
        "_class_name": pipe._diffusers_class or type(pipe).__name__,  # of a user's subclass too
        "_diffusers_version": diffusers.__version__,
        "is_distilled": pipe.is_distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", type(pipe.tokenizer).__name__],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }


def save(pipe: Any, target: Path, *, text_source: Path | ReferenceType[Any] | None, variant: str | None = None) -> None:
    """Write the folder `target`, which is new or empty, whole or not at all.

    `text_source` is where the text encoder was loaded from, or the network of transformers that it shares. Raises
    `InvalidRequest`, `CheckpointError` and `OutputError`.
    """
    if pipe.parallel is not None:
        raise InvalidRequest("save_pretrained", "a parallel model is in parts; save it in one process")
    if variant is not None and not (variant.isascii() and variant.replace("-", "").replace("_", "").isalnum()):
        raise InvalidRequest("variant", f"{variant!r} is not a part of a file name; use fp16 or bf16")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OutputError(f"save_directory: {target} is there already and not empty; give a new folder")
    if beside := [lora.name for lora in pipe.networks.adapters.applied if not lora.fused]:
        _logger.warning("save_pretrained: LoRAs %s act beside the weights and are not saved; fuse_lora() first", beside)
    temporary = target.absolute().with_name(f".{target.absolute().name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write(pipe, temporary, text_source)
        if variant is not None:
            for part, stem in STEMS.items():
                weights = temporary / part / f"{stem}.safetensors"
                weights.rename(weights.with_name(f"{stem}.{variant}.safetensors"))
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"save_directory: {target} cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def _write(pipe: Any, folder: Path, text_source: Path | ReferenceType[Any] | None) -> None:
    def write_json(name: str, values: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")

    _write_text_encoder(pipe, folder / "text_encoder", text_source)
    transformer, vae = pipe.transformer, pipe.vae
    save_network("transformer", transformer.state_dict(), transformer_config(transformer), folder / "transformer")
    save_network("vae", vae.state_dict(), dict(vae.config), folder / "vae")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    write_json("model_index.json", model_index(pipe))
    own: dict[str, Any] = {
        "default_size": pipe.default_size,
        "sizes": pipe.sizes,
        "max_reference_pixels": pipe.reference_policy.pixels,
        "references": pipe.kind.references,
        "is_distilled": pipe.kind.distilled,
    }
    if pipe.latent_preview is not None:
        preview = pipe.latent_preview
        own["latent_preview"] = {"weight": preview.weight.tolist(), "bias": preview.bias.tolist()}
    write_json("limner.json", own)


def _write_text_encoder(pipe: Any, folder: Path, source: Path | ReferenceType[Any] | None) -> None:
    whole = source() if isinstance(source, ReferenceType) else None
    if whole is not None:
        whole.save_pretrained(folder)
    elif isinstance(source, Path):
        encoder = pipe.text_encoder
        check_int8(encoder)
        convert(source, folder, to=encoder.quantization or "diffusers", dtype=encoder.dtype, part="text_encoder")
    else:
        raise CheckpointError(
            "text_encoder: its last layers, which no call reads, are not in memory, and where they are is not known; "
            + _AGAIN
        )
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(folder.glob("*.safetensors"))]
        written = {name.removeprefix("model."): (file, name) for file in files for name in file.keys()}  # noqa: SIM118
        for name, value in pipe.text_encoder.network.state_dict().items():
            file, stored = written.get(name, (None, name))
            if file is None or not torch.equal(file.get_tensor(stored), value.cpu()):
                raise CheckpointError(f"text_encoder: {name} was changed since it was loaded; {_AGAIN}")
