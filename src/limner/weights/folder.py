"""The diffusers folder layout: finding it (folder or hub id), reading its tensors without copying, loading strictly.

Tensors are memory-mapped by safetensors and become the parameters themselves, so weights are in memory once. Every
tensor that is missing, unexpected or of another shape is named. Pickled files are never opened.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limner.config import TransformerConfig
from limner.errors import CheckpointError, OutputError
from limner.model.autoencoder import Autoencoder
from limner.model.int8 import Int8Linear, quantize_blocks
from limner.model.preview import LatentPreview
from limner.model.text_encoder import TextEncoder, default_out_layers
from limner.model.transformer import Transformer

__all__ = [
    "bundled_model",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "read_json",
    "read_settings",
    "resolve_model",
    "save_quantized",
]

QUANT_METHOD = "limner_int8"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["model_index.json", "limner.json", *(f"{part}/*" for part in PARTS)]


def bundled_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent.parent / "assets" / "stickers"


def resolve_model(model: str | os.PathLike[str] | None) -> Path:
    """A folder, a hub id, or None for the bundled model, to a folder in the diffusers layout.

    A hub id is downloaded once and found in the cache afterwards, also without a network.
    """
    if model is None:
        return bundled_model()
    try:
        folder, text = Path(model), os.fspath(model)
        there = folder.exists()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"model: {model!r} is not a path or hub id ({error})") from error
    if not there:
        if not _HUB_ID.fullmatch(text):
            raise CheckpointError(f"model: {text} is neither a folder nor a hub id (owner/name); check the path")
        folder = _download(text)
    if not folder.is_dir():
        raise CheckpointError(f"model: {folder} is a file; give the folder that holds model_index.json")
    missing = [name for name in ("model_index.json", *PARTS) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"model: {folder} has no {', '.join(missing)}; give a folder in the diffusers layout")
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = _first_line(error)
        raise CheckpointError(
            f"model: {hub_id} is not in the local cache and could not be downloaded ({reason}); "
            "check the name, the network and your hub login, or give a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is the checkpoint complete?") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: has to hold a JSON object, not {type(value).__name__}")
    return value


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of `stem`.safetensors, or of the shards that its index names, memory-mapped."""
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return _read_file(single)
    if not index.is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        hint = f"; {others[0]} is a pickle and is not read, convert it to safetensors" if others else ""
        raise CheckpointError(f"{folder}: has no {single.name}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}; shards have to be .safetensors files beside it")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors |= _read_file(folder / name)
    listed, found = set(weight_map), set(tensors)
    if listed != found:
        raise CheckpointError(
            f"{index}: {_names('lists but the shards lack', listed - found)}{_names('lacks', found - listed)}"
        )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); it is truncated or damaged, download it again"
        ) from error


def assign(
    module: nn.Module, tensors: Mapping[str, Tensor], *, where: Path, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Makes `tensors` the parameters and buffers of a module built on the meta device. Raises `CheckpointError`."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = _names("missing", expected.keys() - tensors.keys()) + _names(
        "unexpected", tensors.keys() - expected.keys()
    )
    problems += "".join(
        f"{name} is {list(tensors[name].shape)}, the configuration asks for {list(shape)}; "
        for name, shape in list(expected.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    )
    if problems:
        raise CheckpointError(f"{where}: {problems.rstrip('; ')}; these weights are of another model, or incomplete")

    def place(name: str, value: Tensor) -> Tensor:
        keep = not value.is_floating_point() or name.endswith(".weight_scale")  # scales of int8 stay in float32
        return value.to(device=device, dtype=None if keep else dtype)

    module.load_state_dict({name: place(name, value) for name, value in tensors.items()}, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()


def _names(what: str, names: set[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"{what} {', '.join(shown[:4])}{more}; " if shown else ""


def load_transformer(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device, quantize: str | None = None
) -> Transformer:
    """The transformer of a diffusers folder; its tensor names are those of the module.

    `quantize` "int8" makes the blocks' matrices int8; a folder that `save_quantized` wrote has them so already.
    """
    raw = read_json(folder / "config.json")
    config = TransformerConfig.from_diffusers(raw, where=str(folder / "config.json"))
    with torch.device("meta"):
        transformer = Transformer(config)
    stored = _stored_quantization(raw, where=folder / "config.json")
    if stored:
        quantize_blocks(transformer)
    if config.out_channels != config.in_channels:
        raise CheckpointError(
            f"{folder}: out_channels={config.out_channels} has to be in_channels={config.in_channels}"
        )
    assign(transformer, read_tensors(folder, "diffusion_pytorch_model"), where=folder, dtype=dtype, device=device)
    if stored and any(m.weight.dtype != torch.int8 for m in transformer.modules() if isinstance(m, Int8Linear)):
        raise CheckpointError(f"{folder}: config.json says int8, the weights are not; quantize the model again")
    if quantize and not stored:
        quantize_blocks(transformer)
    return transformer


def _stored_quantization(config: Mapping[str, Any], *, where: Path) -> bool:
    """Whether the weights are Limner's int8; refuses quantizations of others."""
    found = config.get("quantization_config")
    if found is None:
        return False
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quantization {method!r} is not supported; allowed: {QUANT_METHOD!r} or none")
    return True


def save_quantized(transformer: Transformer, source: Path, target: Path) -> None:
    """Writes the model folder `source` to `target` with this int8 transformer in place of its own. Raises `OutputError`.

    Nothing is written over: `target` has to be new. It appears whole or not at all.
    """
    beside = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "is there already; give a new folder")
        shutil.copytree(source, beside, ignore=lambda folder, names: ["transformer"] if Path(folder) == source else [])
        config = transformer.config.to_diffusers() | {"quantization_config": {"quant_method": QUANT_METHOD}}
        (beside / "transformer").mkdir()
        (beside / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: value.contiguous() for name, value in transformer.state_dict().items()}
        save_file(tensors, beside / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise OutputError(f"output: {target} cannot be written ({reason}); nothing was left there") from error


def load_autoencoder(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> Autoencoder:
    """The autoencoder of a diffusers folder."""
    from diffusers import AutoencoderKLFlux2

    network = _build(folder, lambda config: AutoencoderKLFlux2.from_config(config))
    assign(network, read_tensors(folder, "diffusion_pytorch_model"), where=folder, dtype=dtype, device=device)
    return Autoencoder(network)


def load_text_encoder(
    folder: Path,
    tokenizer_folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    out_layers: tuple[int, ...] | None = None,
) -> TextEncoder:
    """The Qwen3 of a diffusers folder, up to the last layer that is read; later layers and the head are left on disk."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    config = read_json(folder / "config.json")
    if config.get("model_type") != "qwen3":
        raise CheckpointError(f"{folder}: model_type={config.get('model_type')!r} is not supported; allowed: qwen3")
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int) or depth < 4:
        raise CheckpointError(f"{folder}: num_hidden_layers={depth!r} has to be a whole number of at least 4")
    layers = out_layers or default_out_layers(depth)
    if not layers or max(layers) > depth or min(layers) < 0:
        raise CheckpointError(f"text_encoder_out_layers={list(layers)} has to name layers 0 to {depth} of {folder}")
    used = max(layers)

    def build(values: dict[str, Any]) -> nn.Module:
        values = values | {"num_hidden_layers": used, "layer_types": None}
        if "max_window_layers" in values:
            values["max_window_layers"] = min(int(values["max_window_layers"]), used)
        network: nn.Module = Qwen3Model(Qwen3Config.from_dict(values))
        if used < depth:  # hidden states are read before the norm, but for those of the very last layer
            network.norm = nn.Identity()
        return network

    network = _build(folder, build)
    tensors = {
        name.removeprefix("model."): value
        for name, value in read_tensors(folder, "model").items()
        if not _unread(name, used, depth)
    }
    assign(network, tensors, where=folder, dtype=dtype, device=device)
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


def _unread(name: str, used: int, depth: int) -> bool:
    """Whether a tensor of the text encoder's file is one that no hidden state up to layer `used` depends on."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    norm = name == "model.norm.weight" and used < depth
    return name == "lm_head.weight" or norm or (match is not None and int(match[1]) >= used)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _build(folder: Path, make: Callable[[dict[str, Any]], Any]) -> Any:
    """A network on the meta device from the `config.json` of a folder."""
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            return make(config)
    except Exception as error:  # constructors of other libraries raise what they like
        raise CheckpointError(
            f"{folder / 'config.json'}: does not describe a network ({_first_line(error)})"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSettings:
    """What a folder says besides its parts: `limner.json` may set the default size and dtype, and hold a preview map."""

    default_size: tuple[int, int] = (1024, 1024)
    default_dtype: torch.dtype | None = None
    preview: LatentPreview | None = None


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
    size, dtype = own.get("default_size", [1024, 1024]), own.get("default_dtype")
    if not (
        isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) and s >= 64 and s % 16 == 0 for s in size)
    ):
        raise CheckpointError(
            f"{file}: default_size={size!r} has to be [width, height], multiples of 16 of at least 64"
        )
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
    if dtype not in dtypes:
        raise CheckpointError(f"{file}: default_dtype={dtype!r} is not one of float32, bfloat16, float16")
    preview = None
    if (values := own.get("latent_preview")) is not None:
        try:
            preview = LatentPreview(values["weight"], values["bias"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: latent_preview is not a map of latents to pixels ({error})") from error
    return FolderSettings(default_size=(size[0], size[1]), default_dtype=dtypes[dtype], preview=preview)
