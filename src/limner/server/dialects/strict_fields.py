"""Bodies that take no other fields than theirs: an error of an unknown one says which field was probably meant.

Knows no dialect.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from limner.server.dialects.unused import OfBaseModels, Unused
from limner.spelling import meant

__all__ = ["StrictFields"]

_UNKNOWN = "extra_forbidden"


class StrictFields(BaseModel):
    """Base of a body whose fields are all known. A field without effect is never suggested."""

    model_config = ConfigDict(extra="forbid")
    parts: ClassVar[tuple[type[BaseModel], ...]] = ()
    """Objects inside of the body, which forbid other fields too."""

    @model_validator(mode="wrap")
    @classmethod
    def _suggest(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            found = error.errors(include_url=False)
            if all(one["type"] != _UNKNOWN for one in found):
                raise
            raise ValidationError.from_exception_data(error.title, [cls._told(one) for one in found]) from None

    @classmethod
    def _told(cls, one: Any) -> InitErrorDetails:
        """Return an error as it is, or of an unknown field with the one that was meant."""
        text = one["msg"]
        if one["type"] == _UNKNOWN:
            where = next((part for part in cls.parts if part.__name__ in one["loc"][-2:-1]), cls)
            known = [name for name, field in where.model_fields.items() if not any(map(_has_no_effect, field.metadata))]
            near = meant(str(one["loc"][-1])[:100], known)
            text = f"is not a field here{f'; did you mean {near}?' if near else '; leave it out'}"
        kind = PydanticCustomError(one["type"], "{text}", {"text": text})
        return InitErrorDetails(type=kind, loc=one["loc"], input=one["input"])


def _has_no_effect(mark: object) -> bool:
    return isinstance(mark, Unused) and not isinstance(mark, OfBaseModels)
