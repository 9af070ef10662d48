"""Masks, canvases, strength and weights in the engine: each picture is that of its own call, whatever it was drawn with."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.engines import Heard
from tests.support.tiny import Gate, generators, picture

from limner import CapacityError, InvalidRequest, Pipeline
from limner.config import ReferencePolicy
from limner.engine import Admission, EditRequest, EditResult, Engine, PipelineView
from limner.errors import QueueFull
from limner.images import feathered, prepare_references

CANVAS, OTHER, ELSEWHERE = picture(96, 64), picture(64, 80, seed=1), picture(96, 64, seed=2)


def mask_of(*box: int, size: tuple[int, int] = CANVAS.size) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (box[0], box[1], box[2], box[3]))
    return mask


MASK = mask_of(32, 16, 80, 48)


@pytest.fixture(params=["isolated", "joint"])
def pipe(request: pytest.FixtureRequest, tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder, references=request.param)


@pytest.fixture
def isolated(tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(monkeypatch)
    gate.shut()
    return gate


@pytest.fixture
def engine(pipe: Pipeline) -> Iterator[Engine]:
    engine = Engine(pipe, max_batch=8, memory_bytes=1 << 32)
    yield engine
    engine.close()


def request(pipe: Pipeline, *seeds: int, **control: Any) -> EditRequest:
    """As callers make it, who have prepared the references."""
    image = control.pop("image", [CANVAS, OTHER])
    return EditRequest(
        prompt=control.pop("prompt", "a dog"),
        seeds=seeds or (0,),
        references=prepare_references(image, policy=pipe.reference_policy) if image else (),
        control=control,
    )


def submit(engine: Engine, *requests: EditRequest) -> list[Heard]:
    heard = [Heard() for _ in requests]
    for i, (one, listener) in enumerate(zip(requests, heard, strict=True)):
        engine.submit(one, id=f"{one.prompt}{i}", listener=listener)
    return heard


def alone(pipe: Pipeline, *seeds: int, **control: Any) -> Any:
    prompt, image = control.pop("prompt", "a dog"), control.pop("image", [CANVAS, OTHER])
    return pipe([prompt] * len(seeds), image=image, generator=generators(*seeds), **control)


def same(a: Any, b: Any) -> bool:
    return bool(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1)  # other batches round differently


CONTROLS: list[dict[str, Any]] = [
    {},
    {"mask_image": MASK},
    {"mask_image": mask_of(0, 0, 40, 64), "reference_weights": [1.0, 0.5]},
    {"mask_image": np.linspace(0, 1, 64 * 96).reshape(64, 96), "mask_blur": 0},
    {"mask_image": MASK, "reference_weights": [[0.0, 1.0], [1.0, 1.0], [2.0, 0.5], [1.0, 0.0]]},
    {"reference_weights": [1.0, 1.5], "strength": 0.9},  # of four steps all
    {"preserve": "auto"},
    {"canvas": ELSEWHERE, "mask_image": mask_of(20, 20, 60, 60)},
]
"""Eight requests over the same References."""


def test_eight_masks_and_weights_are_one_prefill_and_one_batch(engine: Engine, pipe: Pipeline, gate: Gate) -> None:
    (first,) = submit(engine, EditRequest(prompt="first", seeds=(0,), width=64, height=64))
    assert gate.entered.wait(60)
    heard = submit(engine, *[request(pipe, i, prompt=f"dog {i}", **how) for i, how in enumerate(CONTROLS)])
    gate.open()
    results = [listener.result() for listener in heard]
    first.result()
    assert engine.stats().prefills == 1
    assert {result.batch for result in results} == {8}
    assert len({result.reference_key for result in results}) == 1
    for i, (result, how) in enumerate(zip(results, CONTROLS, strict=True)):
        expected = alone(pipe, i, prompt=f"dog {i}", **how)
        assert same(result.images[0], expected.images[0]), how
        assert result.reference_key == expected.reference_key
        if "preserve" not in how:  # of which the drift may differ in its last digit
            assert result.metadata_of(0) == expected.metadata == result.metadata
        assert result.canvas == expected.canvas
        if "mask_image" in how and not isinstance(how["mask_image"], np.ndarray):
            outside = feathered(np.asarray(how["mask_image"]), 8) == 0
            kept = np.asarray(how.get("canvas", CANVAS))[outside]
            assert kept.size
            assert np.array_equal(np.asarray(result.images[0])[outside], kept)
    assert engine.stats().prefills == 1
    (kept_report,) = results[6].preserved
    assert kept_report.picture is results[6].images[0]
    assert len({np.asarray(result.images[0]).tobytes() for result in results}) == 8


@pytest.mark.parametrize(
    "how",
    [
        {"mask_image": MASK, "padding_mask_crop": 4},
        {"expand": (0, 0, 32, 16)},
        {"expand": {"size": (128, 96), "anchor": "left"}, "mask_blur": 2},
        {"strength": 0.5},
        {"mask_image": MASK, "reference_guidance": 1.5},
        {"mask_image": [MASK, mask_of(0, 0, 16, 16)]},
        {"image": [OTHER], "canvas": picture(301, 217, seed=3), "mask_image": mask_of(1, 2, 33, 44, size=(301, 217))},
    ],
    ids=lambda how: "-".join(how),
)
def test_pictures_are_those_of_the_call(how: dict[str, Any], engine: Engine, pipe: Pipeline) -> None:
    seeds = (3, 4) if isinstance(how.get("mask_image"), list) else (3,)
    (heard,) = submit(engine, request(pipe, *seeds, **how))
    result, expected = heard.result(), alone(pipe, *seeds, **how)
    assert all(np.array_equal(a, b) for a, b in zip(result.images, expected.images, strict=True))
    assert result.metadata == expected.metadata
    assert result.canvas == expected.canvas
    assert result.reference_key == expected.reference_key
    opened = engine.opened(request(pipe, *seeds, **how))
    assert engine.key_of(opened.references) == result.reference_key
    assert engine.opened(opened) is opened


def test_a_crop_is_another_reference_than_the_whole(isolated: Pipeline) -> None:
    """So a mask that is drawn in a crop shares nothing with a plain edit, and one of the whole canvas shares all."""
    admission = Admission(model=PipelineView(isolated), max_waiting=2, max_batch=4, memory_bytes=1 << 32)

    def key(**control: Any) -> Any:
        opened = admission.opened(request(isolated, **control))
        return admission.batch_key(opened, size=admission.check(opened))

    plain = key()
    assert key(mask_image=MASK) == key(mask_image=mask_of(0, 0, 40, 64), mask_blur=0) == plain
    assert key(strength=0.9) == key(strength=1.0) == key(reference_weights=[0.5, 1.0]) == plain
    assert key(canvas=ELSEWHERE, mask_image=MASK) == plain
    others = [
        key(mask_image=MASK, padding_mask_crop=4),
        key(expand=(0, 0, 32, 16)),
        key(strength=0.5),
        key(reference_guidance=1.5),
        key(canvas=picture(64, 64), mask_image=mask_of(0, 0, 9, 9, size=(64, 64))),
    ]
    assert len({plain, *others}) == 6


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"mask_image": Image.new("L", (64, 64))}, "mask_image: it is 64x64 and the canvas 96x64"),
        ({"mask_image": [MASK, MASK]}, "mask_image: there are 2 for 1 prompts"),
        ({"mask_image": Image.new("L", CANVAS.size)}, "mask_image: no pixel is white, so nothing would be drawn"),
        ({"strength": 0}, "strength: 0 is not a number over 0"),
        ({"expand": (0, 0, 0, 0)}, r"expand: \(0, 0, 0, 0\) adds nothing"),
        ({"expand": (0, 0, 9000, 9000)}, "expand: the new picture would be"),
        ({"mask_blur": 3}, "mask_blur: needs mask_image or expand"),
        ({"preserve": "auto", "mask_image": MASK}, "preserve: is for edits without a mask"),
        ({"reference_weights": [1.0]}, "reference_weights: there are 1 for 2 references"),
        ({"reference_weights": [[1, 1]] * 4, "strength": 0.5}, "there are lists for 4 of 2 steps"),
        ({"reference_guidance": 11}, "reference_guidance: 11 is not a number of 0 to 10"),
        ({"image": [], "mask_image": MASK}, "canvas: mask_image needs a picture to repaint"),
        ({"mask": MASK}, "mask: is not one of reference_weights"),
    ],
)
def test_what_is_refused_when_it_is_submitted(how: dict[str, Any], problem: str, isolated: Pipeline) -> None:
    engine = Engine(isolated, memory_bytes=1 << 32)
    try:
        with pytest.raises(InvalidRequest, match=problem):
            engine.submit(request(isolated, **how), id="a", listener=Heard())
        assert engine.stats().accepted == 0
    finally:
        engine.close()


def test_sizes_and_reuse_are_checked_too(isolated: Pipeline) -> None:
    admission = Admission(model=PipelineView(isolated), max_waiting=2, max_batch=4, memory_bytes=1 << 32)
    masked = request(isolated, mask_image=MASK)
    assert admission.check(masked) == admission.check(replace(masked, width=96)) == (96, 64)
    with pytest.raises(InvalidRequest, match="width: 64 is not that of the canvas as it is drawn, 96"):
        admission.check(replace(masked, width=64))
    with pytest.raises(InvalidRequest, match="reuse: is for models with joint references"):
        admission.check(replace(masked, reuse="step0"))


def test_what_is_to_be_said_of_a_mask_is_in_the_result(isolated: Pipeline) -> None:
    engine = Engine(isolated, memory_bytes=1 << 32)
    (heard,) = submit(engine, request(isolated, mask_image=Image.new("L", CANVAS.size, 255)))
    result: EditResult = heard.result()
    engine.close()
    assert "mask_image: it is white everywhere" in result.warnings[0]


def test_what_is_to_be_said_of_a_size_is_in_the_result(isolated: Pipeline) -> None:
    """Of a request that asks for another than the model has learned; one of its references has such a size already."""
    isolated.sizes = ((64, 64), (160, 96))
    isolated.reference_policy = ReferencePolicy(sizes=isolated.sizes)
    engine = Engine(isolated, memory_bytes=1 << 32)
    plain = request(isolated, image=[picture(150, 100)])
    found: list[EditResult] = [heard.result() for heard in submit(engine, plain, replace(plain, width=96, height=64))]
    engine.close()
    assert [result.images[0].size for result in found] == [(160, 96), (96, 64)]
    assert found[0].warnings == ()
    assert found[1].warnings == (
        "width, height: 96x64 is not a size that this model has learned to draw: 64x64, 160x96; "
        "give width 160 and height 96, or leave both out",
    )


def test_a_caller_of_an_engine_is_told_of_no_cap(isolated: Pipeline) -> None:
    """It is the operator who sets how many pixels a reference has."""
    isolated.sizes = ((160, 96),)
    isolated.reference_policy = ReferencePolicy(sizes=isolated.sizes, max_pixels=160 * 96 - 1)
    engine = Engine(isolated, memory_bytes=1 << 32)
    (heard,) = submit(engine, request(isolated, image=[picture(96, 64)]))
    result: EditResult = heard.result()
    engine.close()
    assert result.warnings == (
        "width, height: 96x64 is not a size that this model has learned to draw: 160x96; give width 160 and height 96",
    )


def test_memory_counts_canvases_and_further_forwards(pipe: Pipeline) -> None:
    admission = Admission(model=PipelineView(pipe), max_waiting=2, max_batch=4, memory_bytes=1 << 32)
    large = picture(1600, 1200, seed=4)

    def needed(*requests: EditRequest) -> int:
        opened = [admission.opened(one) for one in requests]
        return pipe.memory_for(admission._edits(opened, size=admission.check(opened[0])))

    plain = needed(request(pipe))
    masked = request(pipe, mask_image=MASK)
    assert needed(masked) > plain
    assert needed(request(pipe, reference_guidance=1.5)) > plain
    assert needed(request(pipe, strength=0.9)) > plain
    whole = {"image": [large, OTHER]}
    assert needed(request(pipe, preserve="auto", **whole)) > needed(request(pipe, strength=0.9, **whole))
    behind = request(pipe, canvas=large, mask_image=mask_of(0, 0, 64, 64, size=large.size), padding_mask_crop=0)
    assert needed(behind) - needed(masked) > 20 * 1600 * 1200
    assert needed(behind, behind) > needed(behind) + 5 * 1600 * 1200
    short = Admission(model=PipelineView(pipe), max_waiting=2, max_batch=4, memory_bytes=needed(behind) - 1)
    assert short.check(masked) == (96, 64)
    with pytest.raises(CapacityError, match="use .*a smaller canvas"):
        short.check(behind)


def test_a_picture_is_held_once_for_all_of_its_masks(pipe: Pipeline) -> None:
    admission = Admission(model=PipelineView(pipe), max_waiting=2, max_batch=4, memory_bytes=1 << 32)

    def held(*seeds: int, **how: Any) -> int:
        return admission.held_bytes(admission.opened(request(pipe, *seeds, **how)))

    pixels, drawn = 96 * 64, 3 * 96 * 64  # as Pillow holds a pixel: 4 bytes; as it is drawn: 3; in a mask: 1
    assert held() == 0
    assert held(mask_image=MASK) == held(0, 1, mask_image=MASK) == 4 * pixels + drawn + pixels
    assert held(0, 1, 2, mask_image=[MASK, mask_of(0, 0, 9, 64), MASK]) == 4 * pixels + drawn + 3 * pixels
    clear = CANVAS.convert("RGBA")
    assert held(canvas=clear, mask_image=MASK) == held(mask_image=MASK)
    # 96x64 grown to 128x64; what the model sees of it are the tokens of the old picture
    assert held(expand=(0, 0, 32, 0)) == 5 * 128 * 64 + 3 * 128 * 64 + 3 * 96 * 64


def test_canvases_that_wait_are_bounded(tiny_folder: Path, gate: Gate) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(max_pixels=96 * 96))
    engine = Engine(pipe, memory_bytes=40 << 20)
    large = picture(800, 700, seed=4)
    (first,) = submit(engine, EditRequest(prompt="first", seeds=(0,), width=64, height=64))
    assert gate.entered.wait(60)
    masked = request(pipe, canvas=large, mask_image=mask_of(0, 0, 64, 64, size=large.size))
    waits = submit(engine, *[masked] * 3)
    engine.check_room()
    waits += submit(engine, replace(masked, prompt="a cat"))
    with pytest.raises(QueueFull, match="the canvases of 4 requests that wait have 10 MiB, over 10; try again later"):
        engine.check_room()
    gate.open()
    first.result()
    assert [one.result().images[0].size for one in waits] == [large.size] * 4
    engine.check_room()
    engine.close()


def test_an_opened_request_goes_to_other_processes_without_files(isolated: Pipeline, tmp_path: Path) -> None:
    CANVAS.save(tmp_path / "canvas.png")
    MASK.save(tmp_path / "mask.png")
    how = {"canvas": str(tmp_path / "canvas.png"), "mask_image": str(tmp_path / "mask.png"), "image": [OTHER]}
    opened = isolated.opened(request(isolated, **how))
    sent = pickle.dumps(opened)
    assert b"canvas.png" not in sent
    assert len(sent) < 3 * CANVAS.width * CANVAS.height * 5
    (tmp_path / "mask.png").unlink()
    there, here = isolated.draw([pickle.loads(sent)]), isolated.draw([opened])
    assert np.array_equal(np.asarray(there.images[0]), np.asarray(here.images[0]))
