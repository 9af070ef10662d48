"""The nodes Load Limner Model and Load LoRA, and what their socket LIMNER_MODEL carries.

A value of the socket never changes: it is a pipeline and the LoRAs that act in it. Several values share a pipeline; each
use sets exactly the LoRAs of its value. So a branch without a LoRA draws without it, whatever ran before.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limner import Pipeline, ReferencePolicy, ReferenceStore
from limner.engine.load import load_pipeline
from limner.errors import CheckpointError, InvalidRequest, LimnerError
from limner.options import ModelOptions, StoreOptions, options_of

from . import host

__all__ = ["LoadLora", "LoadModel", "Model"]

BUNDLED = "bundled"
OWN = "of the model"
NONE = "none"
FILES = "of the files"
PARTS = {"transformer": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders"}
"""ComfyUI's folders of the parts that may come from single files."""
_KEPT_LORAS = 16
"""LoRAs that stay loaded, the most that may act together: two branches of a graph do not load theirs again and again."""
_OPTIONS = {one.name: one for one in (*options_of(ModelOptions), *options_of(StoreOptions))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """A LoRA file in the state that `state` stands for, and its strength."""

    path: str
    state: str
    strength: float

    @property
    def name(self) -> str:
        """The adapter's name, of this file in this state."""
        return (
            f"{Path(self.path).stem}-{hashlib.sha256(f'{self.path}:{self.state}'.encode()).hexdigest()[:12]}".replace(
                ".", "_"
            )
        )


class SharedPipeline:
    """A pipeline that one call at a time uses."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self._lock = threading.RLock()
        self._used: list[str] = []

    @contextlib.contextmanager
    def use(self, loras: tuple[Lora, ...]) -> Iterator[Pipeline]:
        """Give the pipeline with these LoRAs acting and no others; one that is given twice acts with the sum."""
        with self._lock:
            strengths: dict[str, float] = {}
            for lora in loras:
                self._load(lora)
                strengths[lora.name] = strengths.get(lora.name, 0.0) + lora.strength
            self._pipe.set_adapters(list(strengths), list(strengths.values()))
            yield self._pipe

    def _load(self, lora: Lora) -> None:
        """Load a LoRA, or note that it was used; forget those that were used least recently."""
        name = lora.name
        if name in self._used:
            self._used.remove(name)
        else:
            _check_state(lora, "before it was read")
            self._pipe.load_lora_weights(lora.path, name)
            try:
                _check_state(lora, "while it was read")
            except CheckpointError:
                self._pipe.set_adapters([], [])
                self._pipe.delete_adapters(name)
                raise
        self._used.append(name)
        while len(self._used) > _KEPT_LORAS:
            self._pipe.delete_adapters(self._used.pop(0))


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Model:
    """What LIMNER_MODEL carries."""

    shared: SharedPipeline
    loras: tuple[Lora, ...] = ()

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[Pipeline]:
        """Give the pipeline for one call."""
        with self.shared.use(self.loras) as pipe:
            yield pipe


class LoadModel:
    """A model: the bundled one, a folder, a hub id, and parts of it from single files."""

    CATEGORY = host.CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("LIMNER_MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Loads a FLUX.2-klein-KV-class model. It is loaded again when its files change."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        parts = {part: ([OWN, *host.files(kind)], {"tooltip": _OPTIONS[part].help}) for part, kind in PARTS.items()}
        optional = {
            "path": _text("model", tooltip="a folder anywhere, or a hub id, instead of model"),
            **parts,
            "dtype": _choice("dtype", first=FILES),
            "quantize": _choice("quantize", first=NONE),
            "kv_cache_dtype": _choice("kv_cache_dtype", first=NONE),
            "device": _text("device", tooltip="cpu, cuda, cuda:1 or mps; empty: ComfyUI's device"),
            "memory_limit": _text("memory_limit"),
            "background": _text("background"),
            "max_pixels": (
                "INT",
                {"default": 0, "min": 0, "max": 1 << 26, "tooltip": f"{_OPTIONS['max_pixels'].help}: 0"},
            ),
            "store": _text("store"),
        }
        return {"required": {"model": ([BUNDLED, *host.models()],)}, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, max_pixels: int | None = None) -> bool | str:  # noqa: N802
        try:
            ReferencePolicy(max_pixels=max_pixels or None)
        except LimnerError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str | float:  # noqa: N802
        options = _model_options(**inputs)
        named = [options.model, options.transformer, options.vae, options.text_encoder]
        return host.state_of(*(path for path in named if path is not None and Path(path).exists()))

    @host.outside_inference_mode
    def load(self, **inputs: Any) -> tuple[Model]:
        """Load the model."""
        store = inputs.get("store") or None

        def call() -> Pipeline:
            return load_pipeline(
                _model_options(**inputs),
                store=ReferenceStore.open(store) if store else None,
                progress=lambda part, done, of: host.check_stopped(),
            )

        pipe = host.with_room(call)
        return (Model(shared=SharedPipeline(pipe)),)


class LoadLora:
    """A LoRA that acts in a model, beside those that act in it already."""

    CATEGORY = host.CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("LIMNER_MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Adds a LoRA. Make the references with the model that has it: their K/V depend on it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}
        return {
            "required": {
                "model": ("LIMNER_MODEL",),
                "lora": (host.files("loras", (".safetensors",)),),
                "strength": ("FLOAT", strength),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **inputs: Any) -> str | float:  # noqa: N802
        return host.state_of(host.find("loras", lora))

    @host.outside_inference_mode
    def load(self, model: Model, lora: str, strength: float) -> tuple[Model]:
        """Add the LoRA, after loading it, so that a wrong file is told here."""
        if len(model.loras) == _KEPT_LORAS:
            raise InvalidRequest("lora", f"{_KEPT_LORAS} act in this model, the most that may; leave one out")
        path = host.find("loras", lora)
        added = Lora(path=path, state=_state(path), strength=strength)
        changed = replace(model, loras=(*model.loras, added))
        with changed.pipeline():
            return (changed,)


def _check_state(lora: Lora, when: str) -> None:
    if _state(lora.path) != lora.state:
        raise CheckpointError(f"lora: {lora.path} was replaced {when}; queue the prompt again")


def _state(path: str) -> str:
    """What a file has to be the same for: its inode, size and times."""
    try:
        s = Path(path).stat()
    except OSError as error:
        raise CheckpointError(f"lora: {path} cannot be read ({error.strerror}); choose another") from error
    return f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"


def _model_options(model: str = BUNDLED, path: str = "", **inputs: Any) -> ModelOptions:
    """Read the inputs of Load Limner Model."""
    return ModelOptions(
        model=path or (None if model == BUNDLED else host.models().get(model, model)),
        dtype=_unless(inputs.get("dtype"), FILES),
        quantize=_unless(inputs.get("quantize"), NONE),
        kv_cache_dtype=_unless(inputs.get("kv_cache_dtype"), NONE),
        device=inputs.get("device") or host.device(),
        memory_limit=inputs.get("memory_limit") or None,
        background=inputs.get("background") or None,
        max_pixels=inputs.get("max_pixels") or None,
        transformer=_of_folder("transformer", inputs),
        vae=_of_folder("vae", inputs),
        text_encoder=_of_folder("text_encoder", inputs),
    )


def _of_folder(part: str, inputs: dict[str, Any]) -> str | None:
    name = inputs.get(part, OWN)
    return None if name == OWN else host.find(PARTS[part], name)


def _unless(value: Any, word: str) -> Any:
    return None if value in (None, word) else value


def _text(name: str, *, tooltip: str | None = None) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": "", "tooltip": tooltip or _OPTIONS[name].help}


def _choice(name: str, *, first: str) -> tuple[list[str], dict[str, Any]]:
    return [first, *_OPTIONS[name].choices], {"tooltip": _OPTIONS[name].help}
