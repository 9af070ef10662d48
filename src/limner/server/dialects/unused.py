"""Fields that a dialect takes because clients send them, and that this model has no use for.

A schema marks them; what a request sets of them is told in its answer (`without_effect`). Knows no dialect.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from limner.kinds import ModelKind
from limner.requests import MAX_PROMPT_CHARACTERS

__all__ = [
    "ABOUT",
    "Guidance",
    "NegativePrompt",
    "OfBaseModels",
    "Unused",
    "UnusedField",
    "UnusedFlag",
    "without_effect",
]


class Unused:
    """Marks a field. `asks_nothing` are values, as text in lower case, that ask for what is done anyway."""

    def __init__(self, *asks_nothing: str) -> None:
        self._asks_nothing = asks_nothing

    def is_asked(self, value: object) -> bool:
        """Return whether a value asks for something that is not done."""
        return value is not None and str(value).lower() not in self._asks_nothing


class OfBaseModels(Unused):
    """Marks a field that distilled models, which draw without guidance, have no use for."""


ABOUT = Field(description="for other models: taken, without effect")
UnusedField = Annotated[Any, ABOUT, Unused()]
UnusedFlag = Annotated[Any, ABOUT, Unused("false")]
_GUIDANCE = "of base models: how far to go from the negative prompt; without effect on distilled ones"
Guidance = Annotated[float | None, Field(ge=0, le=100, description=_GUIDANCE), OfBaseModels()]
_NEGATIVE = "of base models: what guidance goes away from; without effect on distilled ones"
NegativePrompt = Annotated[str | None, Field(max_length=MAX_PROMPT_CHARACTERS, description=_NEGATIVE), OfBaseModels("")]


def without_effect(fields: BaseModel, *, kind: ModelKind) -> tuple[str, ...]:
    """Return the names of fields that ask for something that is not done, in the order of the schema.

    `kind` is that of the model: base models have a use for fields marked `OfBaseModels`.
    """
    return tuple(
        name
        for name, field in type(fields).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Unused) and mark.is_asked(getattr(fields, name))
        if kind.distilled or not isinstance(mark, OfBaseModels)
    )
