"""What nodes need of ComfyUI: its folders, its device, progress with previews, and its stop button.

Outside of ComfyUI, as in tests, there are no folders, the device is the CPU, and nobody watches. Knows no nodes.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from limner.errors import CapacityError
from limner.images import to_pil
from limner.weights.digest import FileStamp, file_stamp

__all__ = [
    "CATEGORY",
    "Watch",
    "check_stopped",
    "device",
    "files",
    "find",
    "outside_inference_mode",
    "packs",
    "state_of",
    "with_room",
]

CATEGORY = "Limner"
PACKS = "limner_references"
"""ComfyUI's name for the folders of packs: models/limner_references, and output/limner, where packs are saved."""
PREVIEW_SIDE = 512
_logger = logging.getLogger("limner")
P = ParamSpec("P")
R = TypeVar("R")


def _module(name: str) -> Any:
    """A module of ComfyUI, or None outside of it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise
        return None


def files(kind: str, suffixes: Sequence[str] = (".safetensors", ".gguf")) -> list[str]:
    """Return the names of files in ComfyUI's folders of a kind, such as "loras"."""
    folders = _module("folder_paths")
    if folders is None or kind not in folders.folder_names_and_paths:
        return []
    return [name for name in folders.get_filename_list(kind) if name.lower().endswith(tuple(suffixes))]


def find(kind: str, name: str) -> str:
    """Return the path of a file that `files` names; outside of ComfyUI the name is the path."""
    folders = _module("folder_paths")
    path = folders.get_full_path(kind, name) if folders is not None and kind in folders.folder_names_and_paths else None
    return str(path or name)


def models() -> dict[str, str]:
    """Return the folders in the diffusers layout below models/diffusers, by name."""
    folders = _module("folder_paths")
    roots = folders.get_folder_paths("diffusers") if folders is not None else []
    found: dict[str, str] = {}
    for root in roots:
        for index in sorted(Path(root).glob("*/model_index.json")):
            found.setdefault(index.parent.name, str(index.parent))
    return found


def packs() -> Path:
    """Return the folder for new packs; ComfyUI is told of it, so that it offers the packs in it."""
    folders = _module("folder_paths")
    folder = Path(folders.get_output_directory() if folders is not None else os.curdir) / "limner"
    if folders is not None:
        folders.add_model_folder_path(PACKS, str(folder))
        folders.add_model_folder_path(PACKS, str(Path(folders.models_dir) / PACKS))
    return folder


def device() -> str:
    """Return the device on which ComfyUI computes."""
    management = _module("comfy.model_management")
    return str(management.get_torch_device()) if management is not None else "cpu"


def check_stopped() -> None:
    """Raise ComfyUI's exception if its stop button was pressed."""
    management = _module("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


def with_room(call: Callable[[], R]) -> R:
    """Return what a call returns; where it does not fit in memory, ComfyUI's own models leave, and it is called once more.

    ComfyUI does that for its models alone. Raises `CapacityError` where that is not enough.
    """
    try:
        return call()
    except CapacityError:
        management = _module("comfy.model_management")
        if management is None:
            raise
        _logger.info("ComfyUI's models are unloaded to make room", exc_info=True)
        management.unload_all_models()
        management.soft_empty_cache()
    return call()


class Watch:
    """Tells ComfyUI of each step and shows a preview; its stop button ends the call. For one call of a pipeline."""

    def __init__(self, num_steps: int, *, previews: bool) -> None:
        utils = _module("comfy.utils")
        self.inputs = ("latents", "preview") if previews else ("latents",)
        self._num_steps = num_steps
        self._bar = utils.ProgressBar(num_steps) if utils is not None else None

    def part(self, name: str, done: int, of: int) -> None:
        """Called between the parts of a call, as `progress`."""
        check_stopped()

    def step(self, pipe: object, step: int, timestep: object, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Called after each step, as `callback_on_step_end`."""
        if self._bar is not None:
            preview = None
            if "preview" in tensors:
                preview = ("JPEG", to_pil(tensors["preview"][:1])[0], PREVIEW_SIDE)
            self._bar.update_absolute(step + 1, self._num_steps, preview)
        check_stopped()
        return {}


def state_of(*paths: str) -> str | float:
    """Return what changes when one of these files or folders does; NaN, which equals nothing, while that is not sure.

    For `IS_CHANGED`: a file that is replaced under its name is loaded again.
    """
    found: list[FileStamp] = []
    for path in map(Path, paths):
        for one in [path, *sorted(p for p in path.iterdir() if p.is_dir())] if path.is_dir() else [path]:
            stamp = file_stamp(one)
            if stamp is None:
                return float("nan")
            found.append(stamp)
    return repr(found)


def outside_inference_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Run a node's method without the inference mode that ComfyUI's executor turns on.

    What is made in it, weights too, counts no changes, and changes of weights have to be seen.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run
