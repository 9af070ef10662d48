"""Where a LoRA comes from: find its file and read its tensors and configuration. Knows no names of tensors.

Only safetensors are read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from limner.errors import CheckpointError, InvalidRequest
from limner.weights.bounds import check_json
from limner.weights.files import PICKLES, is_pickle, read_json
from limner.weights.hub import download_failures, downloading, is_hub_id, local_path

__all__ = ["USUAL_NAMES", "copy_tensors", "lora_config", "read_lora", "resolve_lora"]

USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"


def resolve_lora(source: str | os.PathLike[str], *, weight_name: str | None = None) -> Path:
    """Return the file of a LoRA: a file, the one in a folder, or that of a hub id, which is downloaded once.

    Raises `CheckpointError`, also for pickles, by name and by content: reading one runs any program in it.
    """
    path, found = local_path(source, field="lora")
    text = os.fspath(source)
    if not found:
        _refuse_pickle(path)
        if not is_hub_id(text) or path.suffix == ".safetensors":
            raise CheckpointError(f"lora: {text} is neither a file, a folder nor a hub id (owner/name); check the path")
        path = _download(text, weight_name)
    elif path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        path = path / _choose(names, weight_name, where=text)
    elif weight_name not in (None, path.name):
        raise CheckpointError(f"lora: {path} is a file, and weight_name={weight_name!r} names another; leave it out")
    if not path.is_file():
        raise CheckpointError(f"lora: {path} is not a file; check the name")
    _refuse_pickle(path)
    return path


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a file, and its configuration (`lora_config`). Raises `CheckpointError`."""
    with _opened(path) as file:
        # copies: the next training may overwrite the file
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors, lora_config(path, tensors)


def lora_config(path: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """Return the configuration with the alphas of a file with these names of tensors, if there is one.

    It is in the header (diffusers) or in adapter_config.json in the same folder (PEFT). Raises `CheckpointError`.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")  # written by diffusers
    if text:
        try:
            config = json.loads(text)
            check_json(config, where=f"lora: {path}")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"lora: {path}: lora_adapter_metadata in its header is not JSON ({error})") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"lora: {path}: lora_adapter_metadata in its header is not a JSON object")
        return {k.removeprefix("transformer."): v for k, v in config.items() if k.startswith("transformer.")}
    peft = path.with_name(_PEFT_CONFIG)
    own = path.name == USUAL_NAMES[1] or any(name.startswith("base_model.model.") for name in names)
    return read_json(peft) if own and peft.exists() else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"lora: {path}: cannot be read ({error}); it is no safetensors file, or truncated or damaged: download it again"
        ) from error


def copy_tensors(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors by name, which the caller may change later. Raises `InvalidRequest`."""
    for name, value in source.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InvalidRequest("lora", f"{name!r}: {type(value).__name__}: a mapping has to be of names to tensors")
    return {name: value.detach().clone() for name, value in source.items()}


def _choose(names: list[str], weight_name: str | None, *, where: str) -> str:
    """Return the name of the one file to read in a folder or repository."""
    found = [name for name in names if name.endswith(".safetensors")]
    if weight_name is not None:
        if weight_name not in names:
            raise CheckpointError(
                f"lora: {where} has no {weight_name!r}; it has {', '.join(found) or 'no safetensors'}"
            )
        return weight_name
    found = [name for name in USUAL_NAMES if name in found][:1] or found
    if len(found) != 1:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not found:
            _refuse_pickle(Path(where) / pickles[0])
        has = f"{len(found)} ({', '.join(found)}); name one with weight_name" if found else "none; check the name"
        raise CheckpointError(f"lora: {where} has to hold one .safetensors file, it has {has}")
    return found[0]


def _download(hub_id: str, weight_name: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    with downloading(hub_id, field="lora", instead="a file"):
        try:
            names = HfApi().list_repo_files(hub_id)
        except download_failures():  # without a network: look at what was downloaded before
            folder = Path(snapshot_download(hub_id, local_files_only=True))
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        name = _choose(names, weight_name, where=hub_id)
        peft = (Path(name).parent / _PEFT_CONFIG).as_posix()
        return Path(snapshot_download(hub_id, allow_patterns=[name, peft])) / name


def _refuse_pickle(path: Path) -> None:
    """Raise `CheckpointError` for a pickle, by suffix or first bytes."""
    try:
        pickled = is_pickle(path) if path.is_file() else path.suffix.lower() in PICKLES
    except OSError as error:
        raise CheckpointError(f"lora: {path} cannot be read ({error.strerror})") from error
    if pickled:
        raise CheckpointError(
            f"lora: {path} is a pickle and is never opened: reading one runs any program in it; use the .safetensors file"
        )
