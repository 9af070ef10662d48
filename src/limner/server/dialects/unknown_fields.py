"""What the error of a body says: of an unknown field, also which one was probably meant.

Knows no dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from limner.server.dialects.unused import OfBaseModels, Unused
from limner.spelling import meant

__all__ = ["told"]


def told(error: Mapping[str, Any], kind: object) -> str:
    """Return the message of one of pydantic's errors of a body of class `kind`, or of unknown class (None).

    A body's `parts` are the classes of objects inside of it. A field without effect is never suggested.
    """
    text = str(error["msg"])
    if error["type"] != "extra_forbidden" or not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return text
    inside: tuple[type[BaseModel], ...] = getattr(kind, "parts", ())
    where = next((part for part in inside if part.__name__ in error["loc"][-2:-1]), kind)
    known = [name for name, field in where.model_fields.items() if not any(map(_has_no_effect, field.metadata))]
    near = meant(str(error["loc"][-1])[:100], known)
    return f"is not a field here; did you mean {near}?" if near else "is not a field here; leave it out"


def _has_no_effect(mark: object) -> bool:
    return isinstance(mark, Unused) and not isinstance(mark, OfBaseModels)
