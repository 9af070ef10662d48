"""A little of ComfyUI: how it loads a node pack, checks a prompt, caches outputs and runs nodes, as its documentation says.

A node's output is kept while its class, its inputs, what `IS_CHANGED` returns and all of that of the nodes before it stay.
Nodes run in inference mode. The real executor runs the same prompts in `comfyui_runtime.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
Prompt = dict[str, dict[str, Any]]
"""By node id: class_type, and inputs, each a value or [id of another node, number of its output]."""


class Interrupted(Exception):
    """As ComfyUI's InterruptProcessingException."""


def load_pack() -> ModuleType:
    """Import the pack as ComfyUI does, under a name made of its path."""
    name = str(PACK).replace(".", "_x_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class LoadImage:
    """As ComfyUI's node of this name, with the path of a file. What is transparent is masked."""

    CATEGORY, FUNCTION, RETURN_TYPES = "image", "load", ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"image": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, image: str) -> str:  # noqa: N802
        return hashlib.sha256(Path(image).read_bytes()).hexdigest()

    def load(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        opened, mask = Image.open(image), torch.zeros(64, 64)
        if "A" in opened.getbands():
            mask = 1 - torch.from_numpy(np.asarray(opened.getchannel("A")).astype(np.float32) / 255.0)
        values = np.asarray(opened.convert("RGB")).astype(np.float32) / 255.0
        return torch.from_numpy(values)[None], mask[None]


class Host:
    """The modules of ComfyUI that the pack imports, over a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.steps: list[tuple[int, int, Any]] = []
        self.stop_at: int | None = None
        kinds = ("loras", "diffusion_models", "vae", "text_encoders", "diffusers")
        self.paths: dict[str, tuple[list[str], set[str]]] = {kind: ([str(folder / kind)], set()) for kind in kinds}
        for kind in kinds:
            (folder / kind).mkdir()
        host = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
                host.steps.append((value, total, preview))

        def stop() -> None:
            if host.stop_at is not None and len(host.steps) >= host.stop_at:
                host.stop_at = None
                raise Interrupted

        self.unloaded = 0

        def unload() -> None:
            host.unloaded += 1

        modules = {
            "folder_paths": SimpleNamespace(
                folder_names_and_paths=self.paths,
                get_filename_list=self._names,
                get_full_path=self._path,
                get_folder_paths=lambda kind: list(self.paths[kind][0]),
                get_output_directory=lambda: str(folder / "output"),
                add_model_folder_path=self._add,
                models_dir=str(folder / "models"),
            ),
            "comfy.utils": SimpleNamespace(ProgressBar=ProgressBar),
            "comfy.model_management": SimpleNamespace(
                get_torch_device=lambda: torch.device("cpu"),
                throw_exception_if_processing_interrupted=stop,
                unload_all_models=unload,
                soft_empty_cache=lambda: None,
            ),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]

    def _add(self, kind: str, path: str) -> None:
        paths = self.paths.setdefault(kind, ([], set()))[0]
        if path not in paths:
            paths.append(path)

    def _names(self, kind: str) -> list[str]:
        found = (file for root in map(Path, self.paths[kind][0]) for file in sorted(root.glob("*")) if file.is_file())
        return [file.name for file in found]

    def _path(self, kind: str, name: str) -> str | None:
        found = (Path(root) / name for root in self.paths[kind][0])
        return next((str(file) for file in found if file.is_file()), None)


class Executor:
    """Runs prompts one after another, and keeps the outputs of the last one. `ran` are the ids that the last one ran."""

    def __init__(self) -> None:
        self.classes = {**load_pack().NODE_CLASS_MAPPINGS, "LoadImage": LoadImage}
        self.ran: list[str] = []
        self._kept: dict[Any, tuple[Any, ...]] = {}

    def run(self, prompt: Prompt, *ends: str) -> list[tuple[Any, ...]]:
        """Return the outputs of these nodes. Raises `ValueError` for a prompt that ComfyUI would not accept."""
        for id in prompt:
            self._validate(prompt, id)
        self.ran = []
        changed = {id: self._is_changed(prompt, id) for id in prompt}
        signatures = {id: self._signature(prompt, id, changed) for id in prompt}
        self._kept = {key: value for key, value in self._kept.items() if key in signatures.values()}
        with torch.inference_mode():
            return [self._output(prompt, id, signatures) for id in ends]

    def _output(self, prompt: Prompt, id: str, signatures: dict[str, Any]) -> tuple[Any, ...]:
        if signatures[id] not in self._kept:
            inputs = {
                name: self._output(prompt, value[0], signatures)[value[1]] if isinstance(value, list) else value
                for name, value in prompt[id]["inputs"].items()
            }
            kind = self.classes[prompt[id]["class_type"]]
            found = getattr(kind(), kind.FUNCTION)(**inputs)
            self.ran.append(id)
            self._kept[signatures[id]] = found["result"] if isinstance(found, dict) else found
        return self._kept[signatures[id]]

    def _is_changed(self, prompt: Prompt, id: str) -> Any:
        kind = self.classes[prompt[id]["class_type"]]
        if not hasattr(kind, "IS_CHANGED"):
            return False
        given = {name: None if isinstance(x, list) else x for name, x in prompt[id]["inputs"].items()}
        found = kind.IS_CHANGED(**given)
        return object() if found != found else found  # NaN is never what it was

    def _signature(self, prompt: Prompt, id: str, changed: dict[str, Any]) -> Any:
        inputs = (
            (name, (self._signature(prompt, value[0], changed), value[1]) if isinstance(value, list) else value)
            for name, value in sorted(prompt[id]["inputs"].items())
        )
        return prompt[id]["class_type"], changed[id], tuple(inputs)

    def _validate(self, prompt: Prompt, id: str) -> None:
        kind, inputs = self.classes[prompt[id]["class_type"]], prompt[id]["inputs"]
        types = kind.INPUT_TYPES()
        known = {**types["required"], **types.get("optional", {})}
        validate = getattr(kind, "VALIDATE_INPUTS", None)
        own = inspect.getfullargspec(validate).args if validate is not None else []
        if missing := [name for name in types["required"] if name not in inputs]:
            raise ValueError(f"{id}: required inputs are missing: {missing}")
        for name, value in inputs.items():
            expected, about = known[name][0], (*known[name], {})[1]
            if isinstance(value, list):
                given = self.classes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if given != expected:
                    raise ValueError(f"{id}: {name} is {given}, not {expected}")
            elif name in own:
                continue
            elif isinstance(expected, list) and value not in expected:
                raise ValueError(f"{id}: {name}: {value!r} is not in the list {expected}")
            elif not about.get("min", value) <= value <= about.get("max", value):
                raise ValueError(f"{id}: {name}: {value} is beyond the bounds")
        given_own = {name: None if isinstance(x, list) else x for name, x in inputs.items() if name in own}
        if own and (problem := validate(**given_own)) is not True:  # type: ignore[misc]
            raise ValueError(f"{id}: {problem}")


def sockets(types: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and type of each input."""
    for group in types.values():
        yield from ((name, about[0]) for name, about in group.items())
