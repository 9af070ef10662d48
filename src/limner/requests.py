"""What one caller asks the model for: a picture for each seed, or the K/V of references alone.

The command line, batches, both HTTP dialects and the engine make these; the checks of a single value stand here once.
Knows nothing of pipelines, queues or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypedDict

from limner.errors import InvalidRequest
from limner.images import Picture, PreparedReference
from limner.images.mask import MaskSource

__all__ = [
    "CONTROL_FIELDS",
    "CONTROL_VALUES",
    "MAX_PROMPT_CHARACTERS",
    "MAX_STEPS",
    "NOT_OF_CANVAS",
    "OF_MASKS",
    "REFERENCE_CONTROLS",
    "REPAINTING",
    "Control",
    "EditRequest",
    "Loras",
    "PrefillRequest",
    "check_guidance",
    "check_length",
    "check_number",
    "check_prompt",
    "read_loras",
    "repaints",
    "warning_with_mask",
    "with_mask",
]

MAX_STEPS = 100
"""Of one request to an engine, which others wait for; `limner.schedule.MAX_STEPS` is that of any call."""
MAX_PROMPT_CHARACTERS = 32_000
"""Longer prompts are refused: the text encoder reads some hundred words, and tokenizing megabytes takes seconds."""


Loras = Mapping[str, float] | Sequence[tuple[str, float]] | None
"""Which of the loaded LoRAs act, by name, and how strongly; an empty one lets none act; None: as the pipeline is set."""


class Control(TypedDict, total=False):
    """What a request may ask for beyond prompt and references; `docs/control.md` and `docs/lora.md` explain it."""

    reference_weights: Sequence[float] | Sequence[Sequence[float]] | None
    reference_guidance: float
    canvas: Picture | None
    mask_image: MaskSource | Sequence[MaskSource] | None
    strength: float | None
    expand: Sequence[int] | Mapping[str, Any] | None
    mask_blur: int
    padding_mask_crop: int | None
    preserve: str | None
    loras: Loras


REPAINTING = ("mask_image", "expand", "strength", "preserve")
"""What of `Control` asks for a picture to be repainted: `canvas`, or else the first reference."""
OF_MASKS = ("mask_blur", "padding_mask_crop")
"""How it is repainted; they need mask_image or expand."""
REFERENCE_CONTROLS = ("reference_weights", "reference_guidance")
"""How much references count."""
NOT_OF_CANVAS = (*REFERENCE_CONTROLS, "loras")
"""All others say which canvas there is, and what of it is repainted."""
CONTROL_VALUES = ("strength", "expand", *OF_MASKS, "preserve", *NOT_OF_CANVAS)
"""What of `Control` is no picture: values of JSON."""
CONTROL_FIELDS = {"mask": "mask_image", "canvas": "canvas", **{name: name for name in CONTROL_VALUES}}
"""What callers who write no Python call them: options, rows of a manifest, fields of a body."""


def repaints(control: Mapping[str, Any], *, mask: object = None) -> bool:
    """Return whether a picture is repainted. `mask`: one that is not in `control` yet."""
    return any(value is not None for value in (mask, *map(control.get, REPAINTING)))


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRequest:
    """One prompt, one image for each seed. No references: text to image. Sizes in pixels; None: the model's choice.

    Steps and guidance None: what the model was trained for (`limner.kinds`). `reuse` and `control` as of
    `Pipeline.__call__`. `canvas` is the first reference as its caller has it, where it is repainted.
    """

    prompt: str
    seeds: tuple[int, ...]
    references: tuple[PreparedReference, ...] = ()
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    reuse: str | None = None
    control: Control = field(default_factory=lambda: Control())
    canvas: Picture | None = None

    @property
    def pictures(self) -> list[Any]:
        """The references, the first as its caller has it where it is repainted."""
        return [*((self.canvas,) if self.canvas is not None else self.references[:1]), *self.references[1:]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRequest:
    """The K/V of an ordered list of references, computed or found, and kept."""

    references: tuple[PreparedReference, ...]


def check_length(field: str, text: str) -> None:
    """Raises `InvalidRequest` where a prompt or negative prompt is too long to be read, or no Unicode."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            field, f"has {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are allowed; shorten it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"is not valid Unicode at character {error.start}; give it as UTF-8") from None


def check_guidance(scale: float | None) -> None:
    """Raises `InvalidRequest` unless a guidance scale is None or a number of at least 0."""
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (is_number and 0 <= scale < math.inf):
        raise InvalidRequest("guidance_scale", f"{scale!r} is not a number of at least 0; base models take about 4")


def check_number(field: str, value: object, *, of: str = "") -> float:
    """Return a finite number, the one of `of` among several. Raises `InvalidRequest`."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # of a whole number
        number = math.inf
    if not math.isfinite(number):
        text = "a number of over 300 digits" if number == math.inf and isinstance(value, int) else repr(value)
        raise InvalidRequest(field, f"{text}{of and f' of {of!r}'} is not a finite number")
    return number


def read_loras(given: Loras) -> tuple[tuple[str, float], ...] | None:
    """Return the LoRAs of a request as (name, strength), ordered by name; None: as the pipeline is set.

    Raises `InvalidRequest` for what is not names with finite strengths, each name once.
    """
    if given is None:
        return None
    pairs: Any = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise InvalidRequest(
            "loras", f'{given!r} is not names with strengths, as {{"style": 0.8}}; an empty one lets none act'
        )
    found = tuple(sorted((name, check_number("loras", strength, of=name[:80])) for name, strength in pairs))
    if len({name for name, _ in found}) < len(found):
        raise InvalidRequest("loras", f"{given!r} names a LoRA twice; add up its strengths")
    return found


def check_prompt(text: object, *, allow_empty: bool = False) -> None:
    """Raises `InvalidRequest` where a prompt is no text to draw from."""
    if not isinstance(text, str):
        raise InvalidRequest("prompt", f"{type(text).__name__} is not a text; give a string or a list of strings")
    check_length("prompt", text)
    if not text.strip() and not allow_empty:
        raise InvalidRequest("prompt", f"{text!r} is empty; say what to draw or to change")


def with_mask(error: InvalidRequest) -> InvalidRequest:
    """Return an error in the words of callers whose field for `mask_image` is `mask`."""
    name, *file = error.field.split(" ", 1)
    field = " ".join(["mask" if name == "mask_image" else name, *file])
    return InvalidRequest(field, warning_with_mask(error.problem))


def warning_with_mask(text: str) -> str:
    """Return a warning in the words of callers whose field for `mask_image` is `mask`."""
    return text.replace("mask_image", "mask")
