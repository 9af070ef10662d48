"""The policy of refusal: checks run in order, the first finding refuses, and so does a check that fails.

Knows nothing of models, queues or HTTP. The caller stores no picture of a refused job.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from limner.trust.safety.check import DEFAULT_TOLERANCE, Finding, Role, SafetyCheck, check_tolerance
from limner.trust.safety.pictures import NsfwImageCheck
from limner.trust.safety.prompts import PromptCheck

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Checks", "default_checks", "no_checks"]

_logger = logging.getLogger("limner")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """Checks in order. The first finding counts, and a check that raises refuses."""

    checks: tuple[SafetyCheck, ...] = field(default=())

    def check_prompt(self, prompt: str, *, tolerance: int = DEFAULT_TOLERANCE) -> Finding | None:
        """Return the first finding about a prompt, or None. Raises `InvalidRequest` for a tolerance out of 0 to 5."""
        check_tolerance(tolerance)
        for check in self.checks:
            try:
                finding = check.check_prompt(prompt, tolerance=tolerance)
            except Exception:
                finding = _failed(check)
            if finding is not None:
                return finding
        return None

    def check_images(
        self, images: Sequence[Image.Image], *, role: Role, tolerance: int = DEFAULT_TOLERANCE
    ) -> Finding | None:
        """Return the first finding about pictures, or None; of several it names which. Raises as `check_prompt`."""
        check_tolerance(tolerance)
        for number, image in enumerate(images, start=1):
            for check in self.checks:
                try:
                    finding = check.check_image(image, role=role, tolerance=tolerance)
                except Exception:
                    finding = _failed(check)
                if finding is not None:
                    return finding if len(images) == 1 else replace(finding, reason=f"Image {number}: {finding.reason}")
        return None


def _failed(check: SafetyCheck) -> Finding:
    """Log the exception that is being handled, and return a finding that refuses."""
    name = getattr(check, "name", type(check).__name__)
    _logger.exception("safety check %s failed; the job is refused", name)
    return Finding(
        check=name,
        category="check_failed",
        reason=f"The safety check {name} failed, so nothing is let through; try again, or tell the operator.",
    )


def default_checks(*, terms: str | os.PathLike[str] | None = None) -> Checks:
    """Return the checks of prompts, with the terms of the file `terms`, and of pictures. Raises `MissingExtra`."""
    prompt = PromptCheck() if terms is None else PromptCheck.from_file(terms)
    return Checks(checks=(prompt, NsfwImageCheck()))


def no_checks() -> Checks:
    """Return checks that refuse nothing; whoever chooses them is responsible for what is made."""
    return Checks()
