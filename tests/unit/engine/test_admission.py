"""Which requests an engine accepts, and what it says of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.support.tiny import picture

from limner import CapacityError, InvalidRequest, Pipeline
from limner.engine import Admission, EditRequest, PipelineView, PrefillRequest
from limner.errors import QueueFull
from limner.images import prepare_reference
from limner.kinds import ISOLATED, ModelKind

BASE = ModelKind(references="joint", distilled=False)


@pytest.fixture
def admission(pipe: Pipeline) -> Admission:
    return Admission(model=PipelineView(pipe), max_waiting=2, max_batch=4, memory_bytes=1 << 30)


def edit(**changed: Any) -> EditRequest:
    return EditRequest(**{"prompt": "a dog", "seeds": (0,), "width": 64, "height": 64, **changed})


def test_sizes_are_explicit_or_the_first_references_or_the_models(admission: Admission, pipe: Pipeline) -> None:
    references = tuple(prepare_reference(picture(80 + i, 64), policy=pipe.reference_policy) for i in (0, 16))
    free = {"width": None, "height": None}
    assert admission.check(edit(width=96)) == (96, 64)
    assert admission.check(edit(references=references, **free)) == (80, 64)
    assert admission.check(edit(references=references, width=128, height=None)) == (128, 64)
    assert admission.check(edit(**free)) == pipe.default_size
    assert admission.check(PrefillRequest(references=references)) == pipe.default_size


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "prompt: ' ' is empty"),
        ({"seeds": ()}, "seeds: there are none; give one for each image"),
        ({"seeds": tuple(range(5))}, "num_images: 5 images are over the 4 of a batch"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not within 1 to 100"),
        ({"num_inference_steps": 101}, "num_inference_steps: 101 is not within 1 to 100"),
        ({"width": 65}, "width: 65 is not a multiple of 16"),
        ({"height": 48}, "height: 48 is not a multiple of 16 of at least 64; use 64"),
    ],
)
def test_edits_that_are_refused(changed: dict[str, Any], message: str, admission: Admission) -> None:
    with pytest.raises(InvalidRequest) as raised:
        admission.check(edit(**changed))
    assert str(raised.value).startswith(message)


def test_prefills_that_are_refused(admission: Admission) -> None:
    with pytest.raises(InvalidRequest, match="references: there are none; give at least one picture"):
        admission.check(PrefillRequest(references=()))


def test_memory_bounds_edits_prefills_and_batches(admission: Admission, pipe: Pipeline) -> None:
    reference = prepare_reference(picture(64, 64), policy=pipe.reference_policy)
    needed = pipe.memory_needed(num_ref=16, num_own=16 + min(512, pipe.text_encoder.max_length), batch=2)
    enough, short = replace(admission, memory_bytes=needed), replace(admission, memory_bytes=needed - 1)
    two = [edit(references=(reference,)), edit(references=(reference,))]
    assert enough.fits(two, size=(64, 64))
    assert not short.fits(two, size=(64, 64))
    assert enough.check(edit(seeds=(1, 2), references=(reference,))) == (64, 64)
    with pytest.raises(CapacityError, match="references: 16 reference tokens and 2 x .* own tokens need"):
        short.check(edit(seeds=(1, 2), references=(reference,)))
    tiny = replace(admission, memory_bytes=1000)
    with pytest.raises(CapacityError, match="GiB are free"):
        tiny.check(PrefillRequest(references=(reference,)))


@pytest.mark.parametrize(
    ("kind", "changed", "forwards"),
    [
        (ISOLATED, {}, 1),
        (ISOLATED, {"guidance_scale": 3.0}, 1),  # distilled models leave it out
        (BASE, {}, 2),
        (BASE, {"guidance_scale": 1.0}, 1),
        (ISOLATED, {"control": {"reference_guidance": 1.5}}, 2),
        (ISOLATED, {"control": {"reference_guidance": 1.0}}, 1),
        (BASE, {"guidance_scale": 3.0, "control": {"reference_guidance": 1.5}}, 3),
    ],
    ids=["distilled", "distilled-guidance", "base", "base-none", "references", "references-none", "both"],
)
def test_work_counts_each_forward(
    pipe: Pipeline, admission: Admission, kind: ModelKind, changed: dict[str, Any], forwards: int
) -> None:
    class View(PipelineView):
        kind: ModelKind  # type: ignore[assignment]

    View.kind = kind
    view = replace(admission, model=View(pipe))
    reference = prepare_reference(picture(80, 64), policy=pipe.reference_policy)
    asked = edit(seeds=(1, 2), width=96, num_inference_steps=5, references=(reference,), **changed)
    assert view.step_work(asked, size=(96, 64)) == 2 * 96 * 64 * forwards
    assert view.work(asked, size=(96, 64)) == 80 * 64 + 5 * 2 * 96 * 64 * forwards
    prefill = PrefillRequest(references=(reference,))
    assert (view.work(prefill, size=(96, 64)), view.step_work(prefill, size=(96, 64))) == (80 * 64, 0)


def test_room(admission: Admission) -> None:
    admission.check_waiting(1)
    with pytest.raises(QueueFull, match="2 requests wait, which is all that may; try again later"):
        admission.check_waiting(2)


@pytest.mark.parametrize("name", ["max_waiting", "max_batch"])
def test_bounds_that_are_none(name: str, admission: Admission) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: 0 is not at least 1"):
        replace(admission, **{name: 0})  # type: ignore[arg-type]
