"""The diffusers folder of a model: finding it and its parts (folders, files or hub ids), and loading strictly.

Tensors are memory-mapped where they are stored wide and become the parameters themselves, so weights are in memory once.
Every tensor that is missing, unexpected, of another shape or not finite is named. Pickled files are never opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.errors import CheckpointError
from limner.model.autoencoder import Autoencoder
from limner.model.divide import Sharding, agree_on_arithmetic, divide
from limner.model.preview import LatentPreview
from limner.model.shards import Ranks
from limner.model.text_encoder import TextEncoder
from limner.model.transformer import Transformer
from limner.weights.checkpoint import Checkpoint, open_part
from limner.weights.digest import digest_tensors
from limner.weights.files import read_json
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer, text_layers

__all__ = [
    "FolderSettings",
    "bundled_model",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "read_json",
    "read_settings",
    "resolve_model",
    "resolve_part",
    "transformer_digest",
]

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def bundled_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent.parent / "assets" / "stickers"


def resolve_model(model: str | os.PathLike[str] | None, *, without: Collection[str] = ()) -> Path:
    """A folder, a hub id, or None for the bundled model, to a folder in the diffusers layout.

    A hub id is downloaded once and found in the cache afterwards, also without a network. Parts named in `without` come
    from elsewhere: the folder may lack them, and of a hub id only their configurations are downloaded.
    """
    if model is None:
        return bundled_model()
    folder = _find(model, "model", without=without)
    if not folder.is_dir():
        raise CheckpointError(
            f"model: {folder} is a file; give the folder that holds model_index.json, and the file as transformer=, vae= "
            "or text_encoder="
        )
    missing = [name for name in ("model_index.json", *PARTS) if name not in without and not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"model: {folder} has no {', '.join(missing)}; give a folder in the diffusers layout")
    return folder


def resolve_part(part: str, given: str | os.PathLike[str] | None, *, model: Path) -> Path:
    """Where a part comes from: the model's folder, or what was given: a file, a folder of the part or of a whole model,
    or the hub id of a whole model."""
    if given is None:
        return model / part
    found = _find(given, part, without=[name for name in PARTS if name != part])
    if found.is_dir() and not (found / "config.json").exists() and (found / part).is_dir():
        return found / part
    return found


def _find(given: str | os.PathLike[str], field: str, *, without: Collection[str]) -> Path:
    """What a path or hub id stands for on this disk."""
    try:
        path, text = Path(given), os.fspath(given)
        there = path.exists()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{field}: {given!r} is not a path or hub id ({error})") from error
    if there:
        return path
    if not _HUB_ID.fullmatch(text) or path.suffix in (".safetensors", ".gguf", ".sft"):
        raise CheckpointError(f"{field}: {text} is neither a folder nor a hub id (owner/name); check the path")
    return _download(text, field, without=without)


def _download(hub_id: str, field: str, *, without: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["model_index.json", "limner.json", *(f"{name}/*" for name in PARTS if name not in without)]
    patterns += [f"{name}/config.json" for name in without]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = _first_line(error)
        raise CheckpointError(
            f"{field}: {hub_id} is not in the local cache and could not be downloaded ({reason}); "
            "check the name, the network and your hub login, or give a folder"
        ) from error


def assign(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    used: int | None = None,
    depth: int | None = None,
    after: Callable[[Tensor], None] | None = None,
    expected: Mapping[str, Tensor] | None = None,
    own: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Makes the tensors of a checkpoint those of a module built on the meta device, one at a time.

    int8 matrices of the module are quantized as they come, unless they are stored so: a model is never in memory both
    wide and narrow. `used` and `depth` are for a text encoder that is cut; `after` is told of each tensor that was looked
    at. A module that is a part of a network has its part of each tensor from `own`; `expected` are the whole ones. Raises
    `CheckpointError`.
    """
    expected = module.state_dict() if expected is None else expected
    checkpoint.check(expected, used=used, depth=depth)
    tensors = {}
    for name, value in checkpoint.stream(expected, dtype):
        tensors[name] = (value if own is None else own(name, value)).to(device)
        if after is not None:
            after(tensors[name])
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()


def load_transformer(
    source: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: str | None = None,
    like: Path | None = None,
    after: Callable[[Tensor], None] | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """The transformer of a folder or file of any layout; `like` is a config.json that may say what a file does not.

    `quantize` "int8" makes the blocks' matrices int8; a checkpoint in Limner's int8 has them so already. With `ranks` it is
    this process's part of it: no more than that, and one whole tensor for a moment, is copied.
    """
    checkpoint, transformer = _open_transformer(source, quantize=quantize, like=like)
    ranks = ranks or Ranks.single()
    whole, sharding = transformer.state_dict(), Sharding(config=transformer.config, ranks=ranks)
    divide(transformer, ranks)

    def own(name: str, value: Tensor) -> Tensor:
        part = sharding.part(name, value)
        of_file = value.untyped_storage().nbytes() > value.nbytes
        # a part that is a view stays mapped with its file; one of a tensor that was cast would keep the whole in memory
        return part if of_file or part.nbytes == value.nbytes else part.clone()

    assign(transformer, checkpoint, dtype=dtype, device=device, after=after, expected=whole, own=own)
    agree_on_arithmetic(transformer, ranks)
    return transformer


def transformer_digest(
    source: Path, *, dtype: torch.dtype | None, quantize: str | None = None, like: Path | None = None
) -> str:
    """The digest of the whole transformer that `load_transformer` gives, read tensor by tensor."""
    checkpoint, transformer = _open_transformer(source, quantize=quantize, like=like)
    return digest_tensors(checkpoint.stream(transformer.state_dict(), dtype))


def _open_transformer(source: Path, *, quantize: str | None, like: Path | None) -> tuple[Checkpoint, Transformer]:
    """The checkpoint, and its network without memory."""
    checkpoint = open_part("transformer", source, like=like)
    config = TransformerConfig.from_diffusers(checkpoint.config, where=str(source))
    int8 = quantize == "int8" or checkpoint.layout.quantization == "int8"
    return checkpoint, empty_transformer(config, int8=int8, where=source)


def load_autoencoder(
    source: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    like: Path | None = None,
    after: Callable[[Tensor], None] | None = None,
) -> Autoencoder:
    """The autoencoder of a diffusers folder, or of a file with diffusers' or the original's names."""
    checkpoint = open_part("vae", source, like=like)
    network = empty_autoencoder(checkpoint.config, where=source / "config.json" if source.is_dir() else source)
    assign(network, checkpoint, dtype=dtype, device=device, after=after)
    return Autoencoder(network)


def load_text_encoder(
    source: Path,
    tokenizer_folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    out_layers: tuple[int, ...] | None = None,
    like: Path | None = None,
    after: Callable[[Tensor], None] | None = None,
) -> TextEncoder:
    """A Qwen3 from a folder or file, up to the last layer that is read; later layers and the head are left on disk."""
    from transformers import AutoTokenizer

    checkpoint = open_part("text_encoder", source, like=like)
    depth, layers = text_layers(checkpoint.config, out_layers, where=source)
    used = max(layers)
    where = source / "config.json" if source.is_dir() else source
    network = empty_text_network(checkpoint.config, used=used, depth=depth, where=where)
    assign(network, checkpoint, dtype=dtype, device=device, used=used, depth=depth, after=after)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        encoder = TextEncoder(network, tokenizer, out_layers=layers)
        encoder.rebuild_rotary()
        largest = int(encoder.tokenize("a", max_sequence_length=8).ids.max())
    except Exception as error:  # what a damaged tokenizer raises is up to three libraries
        raise CheckpointError(f"{tokenizer_folder}: the tokenizer cannot be used ({_first_line(error)})") from error
    if max(largest + 1, len(tokenizer)) > network.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: the tokenizer has {len(tokenizer)} tokens, the text encoder {network.config.vocab_size}; "
            "they are of different models"
        )
    return encoder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSettings:
    """What a folder says besides its parts: `limner.json` may set the default size and dtype, say which sizes
    (width, height) the model draws (none: any) and how many pixels a reference keeps, and hold a preview map."""

    default_size: tuple[int, int] = (1024, 1024)
    sizes: tuple[tuple[int, int], ...] = ()
    default_dtype: torch.dtype | None = None
    preview: LatentPreview | None = None
    max_reference_pixels: int | None = None


def _is_size(value: Any) -> bool:
    """Whether a value of JSON is [width, height] of a picture."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(side, int) and side >= 64 and side % 16 == 0 for side in value)
    )


def read_settings(folder: Path) -> FolderSettings:
    """Checks `model_index.json` and reads `limner.json`, if it is there."""
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith("Flux2Klein"):
        raise CheckpointError(
            f"{folder}: model_index.json is of a {kind}; allowed: the klein pipelines (Flux2Klein...)"
        )
    if index.get("is_distilled") is False:
        raise CheckpointError(f"{folder}: is_distilled is false; base models need guidance, which is not supported")
    file = folder / "limner.json"
    own = read_json(file) if file.is_file() else {}
    sizes = own.get("sizes", [])
    if not (isinstance(sizes, list) and all(_is_size(one) for one in sizes)):
        raise CheckpointError(
            f"{file}: sizes={sizes!r} has to be a list of [width, height], multiples of 16 of at least 64"
        )
    size: Any = own.get("default_size", sizes[0] if sizes else [1024, 1024])
    dtype = own.get("default_dtype")
    if not _is_size(size):
        raise CheckpointError(
            f"{file}: default_size={size!r} has to be [width, height], multiples of 16 of at least 64"
        )
    if sizes and size not in sizes:
        raise CheckpointError(f"{file}: default_size={size!r} has to be one of sizes={sizes!r}")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
    if dtype not in dtypes:
        raise CheckpointError(f"{file}: default_dtype={dtype!r} is not one of float32, bfloat16, float16")
    pixels = own.get("max_reference_pixels")
    if pixels is not None and not (isinstance(pixels, int) and pixels >= 256):
        raise CheckpointError(f"{file}: max_reference_pixels={pixels!r} has to be a number of at least 256")
    preview = None
    if (values := own.get("latent_preview")) is not None:
        try:
            preview = LatentPreview(values["weight"], values["bias"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: latent_preview is not a map of latents to pixels ({error})") from error
    return FolderSettings(
        default_size=(size[0], size[1]),
        sizes=tuple((w, h) for w, h in sizes),
        default_dtype=dtypes[dtype],
        preview=preview,
        max_reference_pixels=pixels,
    )
