"""Masks and strength: the latents are those of diffusers' `Flux2KleinInpaintPipeline`; outside of the mask nothing changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.tiny import MAX_TOKENS, TEXT_LAYERS, generators, picture

import limner
from limner import EditRequest, InvalidRequest, Pipeline, ReferencePolicy
from limner.images import cut, feathered, prepare_references
from limner.pipeline.canvas import open_canvases
from limner.tokens import reference_ids

TOLERANCE = 2e-5
CANVAS, OTHER = picture(96, 64), picture(64, 80, seed=1)
OTHER_96 = picture(96, 64, seed=2)


def mask_of(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


MASK = mask_of(CANVAS.size, (32, 16, 80, 48))
"""On the grid of tokens, where diffusers' mask of tokens is the same."""


@pytest.fixture(scope="module")
def inpaint(standard_folder: Path) -> Any:
    from diffusers import Flux2KleinInpaintPipeline

    pipe = Flux2KleinInpaintPipeline.from_pretrained(standard_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "how",
    [
        {"strength": 1.0},
        {"strength": 0.8, "num_inference_steps": 6},
        {"strength": 0.5, "image_reference": OTHER},
        {"strength": 1.0, "num_images_per_prompt": 2, "prompt": ["a dog", "a fox"]},
    ],
    ids=["all steps", "fewer", "a reference", "a batch"],
)
def test_latents_of_diffusers(how: dict[str, Any], standard_folder: Path, inpaint: Any) -> None:
    settings = {"prompt": "a dog", "num_inference_steps": 4, **how}
    reference = settings.pop("image_reference", None)
    num = len(settings["prompt"]) * 2 if isinstance(settings["prompt"], list) else 1
    common = {"max_sequence_length": MAX_TOKENS, "output_type": "latent"}
    expected = inpaint(
        image=CANVAS,
        mask_image=MASK,
        image_reference=reference,
        generator=generators(*range(num)),
        text_encoder_out_layers=TEXT_LAYERS,
        **settings,
        **common,
    ).images
    pipe = Pipeline.from_pretrained(standard_folder)
    image = [CANVAS] if reference is None else [CANVAS, reference]
    out = pipe(image=image, mask_image=MASK, generator=generators(*range(num)), **settings, **common)
    assert isinstance(out.images, torch.Tensor)
    torch.testing.assert_close(out.images, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"strength": 0.5, "image_reference": OTHER, "mask_image": mask_of(CANVAS.size, (9, 5, 61, 50))},
        {"image": picture(101, 75, seed=4), "mask_image": mask_of((101, 75), (30, 21, 60, 50))},
        {"padding_mask_crop": 8, "mask_image": mask_of(CANVAS.size, (41, 20, 70, 45))},
    ],
    ids=["default", "weak, with a reference", "off the grid", "padding"],
)
def test_the_drop_in_has_diffusers_pictures(how: dict[str, Any], standard_folder: Path, inpaint: Any) -> None:
    settings = {
        "prompt": "a dog",
        "image": CANVAS,
        "mask_image": MASK,
        "num_inference_steps": 4,
        "strength": 1.0,
        **how,
    }
    settings |= {"max_sequence_length": MAX_TOKENS, "text_encoder_out_layers": TEXT_LAYERS}
    settings["output_type"] = "pil" if "padding_mask_crop" in how else "np"
    expected = inpaint(**settings, generator=generators(1)[0]).images
    ours = limner.Flux2KleinInpaintPipeline.from_pretrained(standard_folder)
    found = ours(**settings, generator=generators(1)[0]).images
    if settings["output_type"] == "pil":
        assert found[0].size == expected[0].size
        assert np.abs(np.asarray(found[0]).astype(int) - np.asarray(expected[0])).max() <= 1
    else:
        assert np.abs(found - expected).mean() <= TOLERANCE


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 0, 3, 3)])
def test_a_mask_of_which_no_token_is_left_is_drawn_as_diffusers_does_and_said(
    standard_folder: Path, box: tuple[int, int, int, int]
) -> None:
    ours = limner.Flux2KleinInpaintPipeline.from_pretrained(standard_folder)
    how = {"num_inference_steps": 1, "strength": 1.0, "output_type": "latent"}
    out = ours("a dog", image=CANVAS, mask_image=mask_of(CANVAS.size, box), **how)
    assert out.warnings[0].startswith("mask_image: it marks none of the tokens")
    assert ours("a dog", image=CANVAS, mask_image=MASK, **how).warnings == ()


@pytest.fixture(params=["isolated", "joint"])
def pipe(request: pytest.FixtureRequest, tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder, references=request.param)


def draw(pipe: Pipeline, **how: Any) -> Any:
    return pipe(**{"prompt": "a dog", "image": [CANVAS], "generator": generators(1)[0], **how})


def test_outside_of_the_mask_pixels_are_the_canvas_own(pipe: Pipeline) -> None:
    out = draw(pipe, mask_image=MASK, mask_blur=4)
    made, canvas = np.asarray(out.images[0]), np.asarray(CANVAS)
    outside = feathered(np.asarray(MASK), 4) == 0
    assert outside.mean() > 0.3
    assert np.array_equal(made[outside], canvas[outside])
    inside = np.asarray(MASK) == 255
    assert np.abs(made[inside].astype(int) - canvas[inside]).mean() > 5
    (report,) = out.canvas
    assert report.size == CANVAS.size
    assert report.drawn_size == (96, 64)


def test_outside_of_the_mask_stays_in_a_picture_off_the_grid_and_over_the_cap(tiny_folder: Path) -> None:
    from limner import ReferencePolicy

    pipe = Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(max_pixels=96 * 96))
    canvas = picture(301, 217, seed=3)
    mask = mask_of(canvas.size, (201, 101, 231, 121))
    out = draw(pipe, image=[canvas, OTHER], mask_image=mask, mask_blur=3)
    made = out.images[0]
    assert made.size == canvas.size
    outside = feathered(np.asarray(mask), 3) == 0
    assert np.array_equal(np.asarray(made)[outside], np.asarray(canvas)[outside])
    (report,) = out.canvas
    assert report.box != (0, 0, *canvas.size)
    assert report.scale >= 1  # a small place is not drawn smaller than it is
    assert out.metadata["box"] == list(report.box)


def test_strength_of_one_is_a_plain_edit(pipe: Pipeline) -> None:
    assert np.array_equal(np.asarray(draw(pipe, strength=1.0).images[0]), np.asarray(draw(pipe).images[0]))
    weak = draw(pipe, strength=0.5)
    assert weak.metadata["num_inference_steps"] == 2
    plain, canvas = np.asarray(draw(pipe).images[0]).astype(int), np.asarray(CANVAS).astype(int)
    decoded = pipe.autoencoder  # a tiny autoencoder does not give pictures back, so compare with its own reconstruction
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(CANVAS).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        again = decoded.decode(decoded.denormalise(decoded.encode(x)))
    seen = ((again[0] * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    weak_picture = np.asarray(weak.images[0]).astype(int)
    assert np.abs(weak_picture - seen).mean() < np.abs(plain - seen).mean()
    assert canvas.shape == weak_picture.shape


def test_a_full_mask_is_a_plain_edit_and_an_empty_one_is_refused(pipe: Pipeline) -> None:
    full = draw(pipe, mask_image=Image.new("L", CANVAS.size, 255))
    assert np.array_equal(np.asarray(full.images[0]), np.asarray(draw(pipe).images[0]))
    assert "mask_image: it is white everywhere" in full.warnings[0]
    black = Image.new("L", CANVAS.size)
    with pytest.raises(InvalidRequest, match="^mask_image: no pixel is white, so nothing would be drawn"):
        draw(pipe, mask_image=black)
    with pytest.raises(InvalidRequest, match="^mask_image 2: no pixel is white"):
        draw(pipe, prompt=["a", "b"], mask_image=[MASK, black])
    corners = np.zeros((600, 600), np.uint8)
    corners[0, 0] = corners[-1, -1] = 4
    small = limner.ReferencePolicy(max_pixels=64 * 64)
    with pytest.raises(InvalidRequest, match="^mask_image: what it marks is too small to be left in 64x64, as which"):
        open_canvases({"mask_image": corners}, Image.new("RGB", (600, 600)), policy=small, sizes=(), num_prompts=1)


def test_masks_share_references(pipe: Pipeline) -> None:
    """Eight masks over the same pictures: one prefill, and the canvas is encoded once."""
    prepared = pipe._prefiller.prepare([CANVAS, OTHER])
    masks = [mask_of(CANVAS.size, (16 * i % 80, 16, 16 * i % 80 + 16, 48)) for i in range(8)]
    requests = [
        EditRequest(prompt="a dog", seeds=(i,), references=prepared, control={"mask_image": mask})
        for i, mask in enumerate(masks)
    ]
    together = pipe.draw(requests)
    assert pipe.store.stats().misses <= 2  # References, and the tokens of the canvas
    misses = pipe.store.stats().misses
    for i in (0, 5):
        alone = pipe.draw([requests[i]])
        difference = np.asarray(alone.images[0]).astype(int) - np.asarray(together.images[i])
        assert np.abs(difference).max() <= 1  # a value on the edge of rounding
    assert pipe.store.stats().misses == misses


def test_outpainting(pipe: Pipeline) -> None:
    out = draw(pipe, expand=(0, 0, 32, 16), mask_blur=0)
    made = np.asarray(out.images[0])
    assert made.shape[:2] == (80, 128)
    assert np.array_equal(made[: 64 - 16, : 96 - 16], np.asarray(CANVAS)[: 64 - 16, : 96 - 16])
    named = draw(pipe, expand={"size": (128, 80), "anchor": "top-left"}, mask_blur=0)
    assert np.array_equal(np.asarray(named.images[0]), made)


def test_the_model_sees_what_is_known_at_its_place(pipe: Pipeline) -> None:
    """Of an expanded canvas the reference is the old picture: no fill, and positions in the new picture."""
    out = draw(pipe, expand=(32, 16, 0, 0))
    (report,) = out.references
    assert (report.processed_size, report.origin) == (CANVAS.size, (32, 16))
    assert report.describe().endswith("used as 96x64 at 32, 16 of the picture")
    ready = open_canvases({"expand": (32, 16, 0, 0)}, [CANVAS], policy=pipe.reference_policy, sizes=(), num_prompts=1)
    (shown,) = ready[1]
    assert shown.data == CANVAS.tobytes()
    assert shown.computed_digest() == report.digest
    refs = pipe.prefill(shown)
    places = reference_ids([(4, 6)]) + torch.tensor([0, 1, 2, 0])
    assert torch.equal(refs.ids, places)
    tokens = pipe._prefiller._encode((shown,))
    if refs.tokens is None:
        expected = pipe.transformer.prefill(tokens, places)
        assert all(
            torch.equal(a, b) for x, y in zip(refs.kv, expected.kv, strict=True) for a, b in zip(x, y, strict=True)
        )
    assert refs.key != pipe.prefill(CANVAS).key


def test_new_area_to_the_right_and_below_takes_no_prefill(pipe: Pipeline) -> None:
    kept = pipe.prefill(CANVAS)
    out = draw(pipe, expand=(0, 0, 32, 16))
    assert out.reference_key == kept.key
    assert out.reference_cache == "memory"


def test_preserve_takes_what_did_not_change(pipe: Pipeline) -> None:
    out = draw(pipe, preserve="auto")
    (found,) = out.preserved
    assert out.images[0].size == CANVAS.size
    assert 0 <= found.share_kept <= 1
    kept = np.asarray(found.change) == 0
    assert np.array_equal(np.asarray(out.images[0])[kept], np.asarray(CANVAS)[kept])
    assert out.metadata["preserve"] == "auto"


def test_another_canvas_is_no_reference(pipe: Pipeline) -> None:
    out = draw(pipe, image=[OTHER], canvas=CANVAS, mask_image=MASK)
    assert len(out.references) == 1
    assert out.references[0].processed_size == OTHER.size
    assert out.images[0].size == CANVAS.size


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"mask_image": Image.new("L", (64, 64))}, "mask_image: it is 64x64 and the canvas 96x64"),
        ({"image": None, "mask_image": MASK}, "canvas: mask_image needs a picture to repaint"),
        ({"strength": 0}, "strength: 0 is not a number over 0"),
        ({"mask_image": MASK, "expand": (1, 0, 0, 0)}, "expand: mask_image and expand are both given"),
        ({"mask_image": MASK, "preserve": "auto"}, "preserve: is for edits without a mask"),
        ({"preserve": "all"}, "preserve: 'all' is not one of"),
        ({"mask_image": MASK, "width": 64}, "width: 64 is not that of the canvas as it is drawn, 96"),
        ({"mask_image": [MASK, MASK]}, "mask_image: there are 2 for 1 prompts"),
        ({"expand": {"side": 3}}, "expand: side are not expand, size, anchor or overlap"),
        ({"mask_blur": 3}, "mask_blur: needs mask_image or expand"),
    ],
)
def test_what_is_refused(how: dict[str, Any], problem: str, tiny_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        draw(Pipeline.from_pretrained(tiny_folder), **how)


def test_an_unknown_name_suggests_the_right_one(tiny_folder: Path) -> None:
    with pytest.raises(TypeError, match="mask_images: is not an argument of a call; did you mean mask_image"):
        draw(Pipeline.from_pretrained(tiny_folder), mask_images=MASK)


def test_a_mask_of_tokens_is_made_of_the_mask_alone(tiny_folder: Path) -> None:
    pipe, image = Pipeline.from_pretrained(tiny_folder), picture(80, 64)
    mask = mask_of(image.size, (32, 16, 60, 48))
    ((canvas,), _) = open_canvases(
        {"mask_image": mask}, image, policy=pipe.reference_policy, sizes=((96, 64),), num_prompts=1
    )
    _, drawn = cut(canvas.picture, canvas.plan)
    expected = np.asarray(drawn).reshape(4, 16, 6, 16).max((1, 3)).reshape(1, 24, 1)
    no_picture: Any = None
    assert np.allclose((replace(canvas, picture=no_picture).mask() * 255).numpy(), expected)


def test_images_of_one_mask_share_its_feather_and_their_time_has_it(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seconds = [], [0.0]

    def watched(mask: Any, blur: int) -> Any:
        made.append(blur)
        seconds[0] += 100
        return feathered(mask, blur)

    monkeypatch.setattr("limner.images.canvas.feathered", watched)
    monkeypatch.setattr("limner.pipeline.progress.time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    out = draw(pipe, mask_image=MASK, mask_blur=4, num_images_per_prompt=3, generator=generators(1, 2, 3))
    assert made == [4]
    assert (out.timings.decode, out.timings.total) == (100, 100)
    assert out.canvas == (out.canvas[0],) * 3


def repaint(pipe: Pipeline, canvas: Image.Image, *, masked: bool = True, **more: Any) -> EditRequest:
    """References are the same in all of them."""
    control: Any = {"canvas": canvas, "mask_image": mask_of(canvas.size, (32, 16, 80, 48))} if masked else {}
    return EditRequest(
        prompt="a dog",
        seeds=(1,),
        references=prepare_references([CANVAS], policy=pipe.reference_policy),
        control=control,
        **more,
    )


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_results_that_are_no_one_array_are_refused_before_a_step(output_type: str, tiny_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_folder)
    large = repaint(pipe, picture(192, 128))
    small = Pipeline.from_pretrained(tiny_folder, reference_policy=ReferencePolicy(max_pixels=96 * 64))
    parts: list[str] = []

    def told(part: str, done: int, of: int) -> None:
        parts.append(part)

    for other in (repaint(pipe, CANVAS), repaint(pipe, CANVAS, masked=False)):
        with pytest.raises(InvalidRequest, match="output_type: the results have 96x64 and 192x128, so there is no one"):
            small.draw([large, other], output_type=output_type, progress=told)
        assert parts == []
        assert [image.size for image in small.draw([large, other]).images] == [(192, 128), (96, 64)]
        latents = small.draw([large, other], output_type="latent")
        with pytest.raises(InvalidRequest, match="output_type: the results have 96x64 and 192x128, so there is no one"):
            latents.decoded(output_type)
    assert small.draw([large, large], output_type=output_type).images.shape[0] == 2


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_without_canvas_are_not_rounded_beside_one_with_it(output_type: str, pipe: Pipeline) -> None:
    out = pipe.draw([repaint(pipe, OTHER_96), repaint(pipe, CANVAS, masked=False)], output_type=output_type)
    masked, plain = (np.asarray(one, np.float64) * 255 for one in out.images)
    assert np.abs(masked - masked.round()).max() < 1e-3
    assert np.abs(plain - plain.round()).max() > 0.1
    pictures = pipe.draw([repaint(pipe, OTHER_96), repaint(pipe, CANVAS, masked=False)]).images
    for array, image in zip((masked, plain), pictures, strict=True):
        shown = array if output_type == "np" else array.transpose(1, 2, 0)
        assert np.abs(shown - np.asarray(image)).max() < 0.51


def test_prompt_embeds_have_a_mask_each(pipe: Pipeline) -> None:
    embeds = torch.rand(2, 5, pipe.geometry.transformer.text_width, generator=torch.Generator().manual_seed(0))
    out = draw(
        pipe,
        prompt=None,
        prompt_embeds=embeds,
        mask_image=[MASK, mask_of(CANVAS.size, (0, 0, 32, 64))],
        generator=generators(1, 2),
    )
    assert len({one.metadata["mask"] for one in out.own}) == 2
    with pytest.raises(InvalidRequest, match="mask_image: there are 3 for 2 prompts"):
        draw(pipe, prompt=None, prompt_embeds=embeds, mask_image=[MASK] * 3, generator=generators(1, 2))
