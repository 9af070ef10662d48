"""Fields that a dialect takes because clients send them, and that this model has no use for.

A schema marks them; what a request sets of them is told in its answer (`without_effect`). Knows no dialect.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

__all__ = ["ABOUT", "Unused", "UnusedField", "UnusedFlag", "without_effect"]


class Unused:
    """Marks a field. `asks_nothing` are values, as text in lower case, that ask for what is done anyway."""

    def __init__(self, *asks_nothing: str) -> None:
        self._asks_nothing = asks_nothing

    def is_asked(self, value: object) -> bool:
        """Return whether a value asks for something that is not done."""
        return value is not None and str(value).lower() not in self._asks_nothing


ABOUT = Field(description="for other models: taken, without effect")
UnusedField = Annotated[Any, ABOUT, Unused()]
UnusedFlag = Annotated[Any, ABOUT, Unused("false")]


def without_effect(fields: BaseModel) -> tuple[str, ...]:
    """Return the names of marked fields that ask for something, in the order of the schema."""
    return tuple(
        name
        for name, field in type(fields).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Unused) and mark.is_asked(getattr(fields, name))
    )
