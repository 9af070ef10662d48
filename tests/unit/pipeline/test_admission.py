"""Admission by memory: what is refused, and with which numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tests.support.tiny import picture

from limner import CapacityError, Pipeline, ReferencePolicy, ReferenceStore
from limner.memory import Workload
from limner.pipeline.admission import Admission


def test_kept_references_are_not_admitted_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their K/V are in memory already, and no activations of theirs are to come."""
    pictures = [picture(256, 256, seed=i) for i in range(4)]
    refs = pipe.prefill(pictures)
    free = 12 << 20
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert pipe("a dog", references=refs, width=64, height=64).reference_cache == "given"
    assert pipe("a dog", image=pictures, width=64, height=64).reference_cache == "memory"
    pipe.store = ReferenceStore(memory_bytes=0)
    with pytest.raises(CapacityError, match=re.escape("1024 reference tokens")):
        pipe("a dog", image=pictures, width=64, height=64)


def test_refuses_what_does_not_fit_in_memory(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 19

    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: Memory)
    with pytest.raises(CapacityError, match=re.escape("0.00 GiB are free; use fewer or smaller references")):
        pipe.prefill([picture(1024, 1024)] * 3)
    assert len(pipe.store) == 0
    assert pipe.prefill(picture(64, 64)).num_tokens == 16
    with pytest.raises(CapacityError, match=r"^size: 1 x \d+ own tokens need .* use a smaller output"):
        pipe("a dog", image=picture(64, 64), width=1024, height=1024)


@pytest.mark.parametrize("kept", [False, True], ids=["computed", "kept"])
def test_what_a_call_asks_for_is_admitted_together(
    kept: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References that are computed, a canvas and guidance by references: their sum has to fit, not each alone."""
    pipe = Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(max_pixels=96 * 96))
    canvas, pictures, asked = picture(1600, 1200), [picture(256, 256, seed=i) for i in range(4)], list[Workload]()
    mask = Image.new("L", canvas.size)
    mask.paste(255, (0, 0, 64, 64))
    check = Admission.check_call
    monkeypatch.setattr(Admission, "check_call", lambda own, workload: (asked.append(workload), check(own, workload)))

    def draw() -> str:
        found: str = pipe(
            "a dog",
            image=pictures,
            canvas=canvas,
            mask_image=mask,
            padding_mask_crop=0,
            reference_guidance=1.5,
            num_inference_steps=1,
        ).reference_cache
        return found

    assert draw() == "miss"
    if not kept:
        pipe.store = ReferenceStore(memory_bytes=0)
    (workload,) = asked
    counted = replace(workload, references=()) if kept else workload
    needed = pipe.memory_for(counted)
    assert needed > pipe.memory_needed(num_ref=counted.num_ref, num_own=counted.num_own, batch=1) + 5 * 1600 * 1200
    memory = SimpleNamespace(available=needed)
    monkeypatch.setattr("limner.memory.free.psutil.virtual_memory", lambda: memory)
    assert draw() == ("memory" if kept else "miss")
    memory.available = needed - 1
    with pytest.raises(CapacityError, match=r"use .*a smaller canvas, a smaller output"):
        draw()


def test_both_prompts_of_guidance_are_counted_with_the_canvas(pipe: Pipeline) -> None:
    """The canvas too, once; texts and latents of both prompts."""
    workload = Workload(size=(96, 64), references=((256, 256),), num_text=48, guides=True, canvas_pixels=1600 * 1200)
    admission = pipe._admission
    needed = admission.memory_for(workload, together=True)
    plain = admission.memory_needed(num_ref=workload.num_ref, num_own=workload.num_own, batch=2)
    assert needed > plain + 5 * 1600 * 1200
    edit = replace(workload, canvas_pixels=0)
    assert admission.memory_for(edit, together=True) > admission.memory_for(edit)
