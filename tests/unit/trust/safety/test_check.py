"""The tolerance of checks."""

from __future__ import annotations

from typing import Any

import pytest

from limner import InvalidRequest
from limner.trust.safety import PromptCheck, check_tolerance, no_checks


@pytest.mark.parametrize("tolerance", [-1, 6, 2.5, True, "2", None])
def test_refuses_tolerances(tolerance: Any) -> None:
    calls: tuple[Any, ...] = (
        lambda: check_tolerance(tolerance),
        lambda: no_checks().check_prompt("a cat", tolerance=tolerance),
        lambda: no_checks().check_images([], role="input", tolerance=tolerance),
        lambda: PromptCheck().check_prompt("a cat", tolerance=tolerance),
    )
    for call in calls:
        with pytest.raises(InvalidRequest, match="safety_tolerance: .* is not allowed; use 0 .* to 5"):
            call()
