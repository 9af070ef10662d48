"""The nodes that make, save and load references, and what their socket LIMNER_REFERENCES carries.

ComfyUI keeps a node's output while its inputs stay, so references are computed once for all prompts. Whether K/V may be
used is not left to that: they have a content key of weights, LoRAs, pixels and arithmetic, which every use compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from limner import Pipeline, ReferencePolicy, References
from limner.errors import InvalidRequest, LimnerError
from limner.images import PreparedReference, prepare_reference
from limner.references.pack import read_identity

from . import host
from .model import Model
from .pictures import to_pictures

__all__ = ["KeptReferences", "LoadReferences", "MakeReferences", "SaveReferences"]

NUM_IMAGES = 8
_OPTIONAL = [f"image_{i}" for i in range(2, NUM_IMAGES + 1)]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class KeptReferences:
    """What LIMNER_REFERENCES carries: K/V, and the pictures they are of, if these are known (a pack holds none).

    `policy` is that by which the pictures were prepared.
    """

    references: References
    images: tuple[Image.Image, ...] = ()
    pictures: tuple[PreparedReference, ...] = ()
    policy: ReferencePolicy | None = None

    @classmethod
    def make(cls, pipe: Pipeline, images: tuple[Image.Image, ...]) -> KeptReferences:
        """Compute the K/V of pictures in order, or find them in the pipeline's store."""
        policy = pipe.reference_policy
        pictures = tuple(prepare_reference(p, policy=policy, field=f"image {i}") for i, p in enumerate(images, start=1))
        return cls(references=pipe.prefill(list(pictures)), images=images, pictures=pictures, policy=policy)

    def for_pipeline(self, pipe: Pipeline) -> References:
        """Return K/V that are this pipeline's: those that are kept, or else those of the same pictures computed with it.

        Raises `InvalidRequest` for those of a pack that another model, LoRA or dtype has made.
        """
        if not self.pictures or self._made_by(pipe):
            return self.references
        return KeptReferences.make(pipe, self.images).references

    def _made_by(self, pipe: Pipeline) -> bool:
        return self.policy == pipe.reference_policy and self.references.key == pipe.key_of(self.pictures)


class MakeReferences:
    """References of pictures in order, with their K/V."""

    CATEGORY = host.CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("LIMNER_REFERENCES", "STRING")
    RETURN_NAMES = ("references", "report")
    DESCRIPTION = (
        "Image 1, 2, ... of prompts: image_1 to image_8 in order, and of each batch all pictures in order. What is "
        "computed of them is kept while neither they nor the model change."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"model": ("LIMNER_MODEL",), "image_1": ("IMAGE",)},
            "optional": dict.fromkeys(_OPTIONAL, ("IMAGE",)),
        }

    @host.outside_inference_mode
    def make(self, model: Model, image_1: Tensor, **more: Tensor | None) -> tuple[KeptReferences, str]:
        """Prepare the pictures and compute or find their K/V."""
        given = {"image_1": image_1, **{name: more.get(name) for name in _OPTIONAL}}
        images = [p for name, batch in given.items() if batch is not None for p in to_pictures(batch, field=name)]
        host.check_stopped()
        with model.pipeline() as pipe:
            kept = host.with_room(lambda: KeptReferences.make(pipe, tuple(images)))
        return kept, report(kept.references)


class SaveReferences:
    """Writes K/V to a pack in output/limner."""

    CATEGORY = host.CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Saves references as a pack (.safetensors) in output/limner, for Load References and the command line."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"references": ("LIMNER_REFERENCES",), "name": ("STRING", {"default": "references"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:  # noqa: N802
        if name is not None and (not name.strip() or Path(name).name != name or name.startswith(".")):
            return f"name: {name!r} is not the name of a file; give one without folders, such as cat"
        return True

    @host.outside_inference_mode
    def save(self, references: KeptReferences, name: str) -> dict[str, Any]:
        """Write NAME_00001.safetensors, or the next number that is free: nothing is written over."""
        if (problem := self.VALIDATE_INPUTS(name)) is not True:
            raise InvalidRequest("name", str(problem).removeprefix("name: "))
        folder = host.packs()
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (file := folder / f"{name}_{number:05}.safetensors").exists():
            number += 1
        references.references.save(file)
        return {"ui": {"text": [str(file)]}, "result": (str(file),)}


class LoadReferences:
    """Reads a pack."""

    CATEGORY = host.CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("LIMNER_REFERENCES", "STRING")
    RETURN_NAMES = ("references", "report")
    DESCRIPTION = (
        "Loads a pack from output/limner or models/limner_references. The model has to be the one that made it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        host.packs()
        return {"required": {"pack": (host.files(host.PACKS, (".safetensors",)),)}}

    @classmethod
    def IS_CHANGED(cls, pack: str) -> str | float:  # noqa: N802
        path = host.find(host.PACKS, pack)
        try:
            return f"{read_identity(path).key}:{host.state_of(path)}"
        except LimnerError:
            return float("nan")

    @host.outside_inference_mode
    def load(self, pack: str) -> tuple[KeptReferences, str]:
        """Read the pack and check every byte."""
        found = References.load(host.find(host.PACKS, pack))
        return KeptReferences(references=found), report(found)


def report(references: References) -> str:
    """What was done to each picture, and how much the K/V take, as text."""
    lines = [f"image {i}: {one.describe()}" for i, one in enumerate(references.reports, start=1)]
    size = f"{references.num_tokens} tokens, {references.nbytes} bytes of K/V, key {references.key[:16]}"
    return "\n".join([*lines, size])
