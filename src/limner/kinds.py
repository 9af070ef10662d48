"""What a model was trained for: what its references attend to, and whether it draws without guidance.

A property of the weights, never of a call. `isolated` references attend to each other only, at noise level 0, so their K/V
can be kept (FLUX.2-[klein]-9B-KV). `joint` references are in every step and attend to everything at the step's noise level
(standard and base klein), so their tokens alone can be kept. Knows no files and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from limner.errors import InvalidRequest

__all__ = [
    "DIFFUSERS_KINDS",
    "ISOLATED",
    "ModelKind",
    "ReferencesAttention",
    "check_attention",
    "guides",
    "hinted_kind",
]

ReferencesAttention = Literal["isolated", "joint"]
_GUIDED_STEPS, _DISTILLED_STEPS = 50, 4
_GUIDANCE = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelKind:
    """The kind of a model. `distilled`: it was trained to draw in 4 steps without guidance."""

    references: ReferencesAttention
    distilled: bool

    @property
    def joint(self) -> bool:
        return self.references == "joint"

    @property
    def num_inference_steps(self) -> int:
        """Steps of a call that names none: 4 for distilled models; 50, diffusers' default, for base models."""
        return _DISTILLED_STEPS if self.distilled else _GUIDED_STEPS

    @property
    def guidance_scale(self) -> float:
        """Guidance of a call that names none: 1 (none) for distilled models; 4, diffusers' default, for base models."""
        return 1.0 if self.distilled else _GUIDANCE

    def with_references(self, references: ReferencesAttention | None) -> ModelKind:
        """Return this kind with the attention given; itself for None."""
        return self if references is None else replace(self, references=references)

    def __str__(self) -> str:
        return f"{self.references} references, {'distilled' if self.distilled else 'base, with guidance'}"


ISOLATED = ModelKind(references="isolated", distilled=True)
"""The kind of the model that Limner was made for, and of sources that say nothing."""

DIFFUSERS_KINDS = {
    "Flux2KleinKVPipeline": ISOLATED,
    "Flux2KleinPipeline": ModelKind(references="joint", distilled=False),
    "Flux2KleinInpaintPipeline": ModelKind(references="joint", distilled=False),
}
"""The classes of diffusers that klein models name, and their kinds where `is_distilled` is left out (diffusers 0.42.1)."""


def guides(kind: ModelKind, scale: float | None) -> bool:
    """Whether a call with this `guidance_scale` runs negative prompts too: base models, and scales over 1."""
    return not kind.distilled and (kind.guidance_scale if scale is None else scale) > 1


def check_attention(value: object) -> ReferencesAttention | None:
    """Return a valid `references` of a kind, or None. Raises `InvalidRequest`."""
    for allowed in (None, *get_args(ReferencesAttention)):
        if value == allowed:
            found: ReferencesAttention | None = allowed
            return found
    raise InvalidRequest("references", f"{value!r} is not one of None, 'isolated', 'joint'")


def hinted_kind(name: str) -> ModelKind | None:
    """Return the kind that the public name of klein weights stands for, as `flux-2-klein-9b-kv-fp8`; None: no such name.

    A name is a hint and proves nothing.
    """
    words = name.lower().replace("_", "-").replace(".", "-").replace(" ", "-").split("-")
    if "klein" not in words or not {"4b", "9b"} & set(words):
        return None
    return ModelKind(references="isolated" if "kv" in words else "joint", distilled="base" not in words)
