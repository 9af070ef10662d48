"""The bundled model follows prompts and copies from references: on prompts that training never saw, against the truth.

The cases are pictures that the recipe rendered (`recipes/stickers/evaluate.py --save-cases`); some show stickers that no
training picture shows.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import Pipeline
from limner.weights.folder import bundled_model

CASES = Path(__file__).parent / "cases"


@cache
def bundled() -> Pipeline:
    return Pipeline.from_pretrained()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(max(float(np.square(a.astype(float) / 255 - b.astype(float) / 255).mean()), 1e-10))


def run(case: dict[str, Any], **changes: Any) -> np.ndarray:
    with Image.open(CASES / case["truth"]) as truth:
        width, height = truth.size
    arguments = {
        "prompt": case["prompt"],
        "image": [CASES / name for name in case["references"]] or None,
        "width": width,
        "height": height,
        "generator": torch.Generator().manual_seed(0),
    }
    return np.asarray(bundled()(**(arguments | changes)).images[0])


def load(name: str, size: tuple[int, int]) -> np.ndarray:
    with Image.open(CASES / name) as image:
        return np.asarray(image.convert("RGB").resize(size))


def test_beats_copying_the_first_reference() -> None:
    """On average over the tasks, and over the held-out stickers, which only a reference can bring."""
    gains: dict[str, list[float]] = defaultdict(list)
    for case in json.loads((CASES / "cases.json").read_text()):
        result = run(case)
        size = (result.shape[1], result.shape[0])
        truth = load(case["truth"], size)
        copied = load(case["references"][0], size) if case["references"] else np.full_like(truth, 128)
        gains[case["task"]].append(psnr(result, truth) - psnr(copied, truth))
    assert set(gains) == {"draw", "edit", "combine2", "combine3", "combine4", "held_out"}
    assert float(np.mean([g for values in gains.values() for g in values])) > 2
    assert float(np.mean(gains["draw"])) > 4


def test_the_prompt_matters() -> None:
    """The right prompt is nearer to the truth than the prompt of another case."""
    cases = [c for c in json.loads((CASES / "cases.json").read_text()) if c["task"] in ("draw", "edit")]
    right, wrong = [], []
    for case, other in zip(cases, cases[1:] + cases[:1], strict=True):
        result, astray = run(case), run(case, prompt=other["prompt"])
        truth = load(case["truth"], (result.shape[1], result.shape[0]))
        right.append(psnr(result, truth))
        wrong.append(psnr(astray, truth))
    assert np.mean(right) > np.mean(wrong) + 1


def test_references_matter() -> None:
    """Other references give another picture: nothing is looked up by prompt."""
    cases = [c for c in json.loads((CASES / "cases.json").read_text()) if len(c["references"]) == 2]
    for case in cases:
        straight = run(case)
        swapped = run(case, image=[CASES / name for name in reversed(case["references"])])
        assert np.abs(straight.astype(int) - swapped).mean() > 1


@pytest.mark.parametrize("number", [0, 1])
def test_diffusers_gives_the_same_pictures_from_the_same_folder(number: int) -> None:
    from diffusers import Flux2KleinKVPipeline

    theirs = Flux2KleinKVPipeline.from_pretrained(bundled_model(), dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    cases = json.loads((CASES / "cases.json").read_text())
    case = next(c for c in cases if len(c["references"]) == (0, 3)[number])
    pictures = [Image.open(CASES / name).convert("RGB") for name in case["references"]] or None
    pipe = bundled()
    arguments = {"prompt": case["prompt"], "image": pictures, "height": 128, "width": 128, "output_type": "np"}
    expected = theirs(
        **arguments,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=pipe.text_encoder.max_length,
        text_encoder_out_layers=pipe.text_encoder.out_layers,
    ).images
    found = pipe(**arguments, generator=torch.Generator().manual_seed(3)).images
    assert np.abs(found - expected).mean() <= 2e-5


def test_kept_and_recomputed_references_give_equal_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping K/V, of one request for the next or of one step for the next, changes no bit."""
    case = next(c for c in json.loads((CASES / "cases.json").read_text()) if len(c["references"]) == 4)
    kept = [run(case), run(case)]
    assert np.array_equal(kept[0], kept[1])
    transformer, seen = bundled().transformer, []
    prefill, forward = transformer.prefill, transformer.forward

    def remember(*tokens: Any, **more: Any) -> Any:
        seen.append((tokens, more))
        return prefill(*tokens, **more)

    def recompute(*tokens: Any, **given: Any) -> Any:
        words, more = seen[0]
        seen.append(())
        return forward(*tokens, **(given | {"references": prefill(*words, **more)}))

    monkeypatch.setattr(bundled(), "store", type(bundled().store)())
    monkeypatch.setattr(transformer, "prefill", remember)
    monkeypatch.setattr(transformer, "forward", recompute)
    assert np.array_equal(run(case), kept[0])
    assert len(seen) == 1 + 4  # one prefill by the pipeline, then one of ours in each of four steps


def test_the_bundled_model_is_small() -> None:
    size = sum(file.stat().st_size for file in bundled_model().rglob("*") if file.is_file())
    assert size < 40e6
