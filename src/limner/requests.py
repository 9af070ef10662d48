"""What one caller asks the model for: a picture for each seed, or the K/V of references alone.

The command line, batches, both HTTP dialects and the engine make these; the checks of a single value stand here once.
Knows nothing of pipelines, queues or HTTP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from limner.errors import InvalidRequest
from limner.images import PreparedReference

__all__ = [
    "MAX_PROMPT_CHARACTERS",
    "MAX_STEPS",
    "EditRequest",
    "PrefillRequest",
    "check_guidance",
    "check_length",
    "check_prompt",
]

MAX_STEPS = 100
"""Of one request to an engine, which others wait for; `limner.schedule.MAX_STEPS` is that of any call."""
MAX_PROMPT_CHARACTERS = 32_000
"""Longer prompts are refused: the text encoder reads some hundred words, and tokenizing megabytes takes seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRequest:
    """One prompt, one image for each seed. No references: text to image. Sizes in pixels; None: the model's choice.

    Steps and guidance None: what the model was trained for (`limner.kinds`). `reuse`, weights and guidance of
    references as of `Pipeline.__call__`.
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
    reference_weights: tuple[float, ...] | None = None
    reference_guidance: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRequest:
    """The K/V of an ordered list of references, computed or found, and kept."""

    references: tuple[PreparedReference, ...]


def check_length(field: str, text: str) -> None:
    """Raises `InvalidRequest` where a prompt or negative prompt is too long to be read."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            field, f"has {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are allowed; shorten it"
        )


def check_guidance(scale: float | None) -> None:
    """Raises `InvalidRequest` unless a guidance scale is None or a number of at least 0."""
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (is_number and 0 <= scale < math.inf):
        raise InvalidRequest("guidance_scale", f"{scale!r} is not a number of at least 0; base models take about 4")


def check_prompt(text: object, *, allow_empty: bool = False) -> None:
    """Raises `InvalidRequest` where a prompt is no text to draw from."""
    if not isinstance(text, str):
        raise InvalidRequest("prompt", f"{type(text).__name__} is not a text; give a string or a list of strings")
    check_length("prompt", text)
    if not text.strip() and not allow_empty:
        raise InvalidRequest("prompt", f"{text!r} is empty; say what to draw or to change")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest("prompt", f"is not valid Unicode at character {error.start}; give it as UTF-8") from None
