"""What a safety check is: a protocol, the finding that it returns, and the tolerance that a request may ask for.

Knows no particular check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from limner.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEFAULT_TOLERANCE", "MAX_TOLERANCE", "Finding", "Role", "SafetyCheck", "check_tolerance"]

Role = Literal["input", "output"]

DEFAULT_TOLERANCE = 2
"""`safety_tolerance` of a request that does not give one."""
MAX_TOLERANCE = 5
"""The most tolerant `safety_tolerance`; 0 is the strictest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Why a job is refused. `reason` is one sentence for the user; it repeats nothing of prompt or picture."""

    check: str
    category: str
    score: float | None = None
    threshold: float | None = None
    reason: str


class SafetyCheck(Protocol):
    """One check. It is called from several threads. An exception that it raises refuses the job."""

    @property
    def name(self) -> str:
        """The name in findings and logs."""

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Return why the prompt is refused, or None."""

    def check_image(self, image: Image.Image, *, role: Role, tolerance: int) -> Finding | None:
        """Return why the picture is refused, or None. A reference comes as the model reads it: upright, cropped, RGB."""


def check_tolerance(tolerance: int) -> int:
    """Return `safety_tolerance` if it is a whole number from 0 to 5. Raises `InvalidRequest`."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int) or not 0 <= tolerance <= MAX_TOLERANCE:
        raise InvalidRequest("safety_tolerance", f"{tolerance!r} is not allowed; use 0 (strictest) to {MAX_TOLERANCE}")
    return tolerance
