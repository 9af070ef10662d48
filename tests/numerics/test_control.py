"""Weights of references and reference guidance: from the same K/V, exact at 1 and 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.tiny import generators, picture, relative_error

from limner import EditRequest, InvalidRequest, Pipeline
from limner.tokens import image_ids, text_ids

TOLERANCE = 2e-5
REFERENCES = [picture(96, 64), picture(64, 80, seed=1)]


@pytest.fixture(params=["isolated", "joint"])
def control(request: pytest.FixtureRequest, tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder, references=request.param)


def draw(pipe: Pipeline, **how: Any) -> Any:
    settings = {"prompt": "a dog", "height": 64, "width": 80, "image": REFERENCES, "output_type": "np"}
    return pipe(**{**settings, "generator": generators(1)[0], **how})


def test_weights_of_one_change_no_bit(control: Pipeline) -> None:
    plain = draw(control)
    weighted = draw(control, reference_weights=[1.0, 1])
    assert np.array_equal(plain.images, weighted.images)
    assert weighted.reference_cache == "memory"
    other = draw(control, reference_weights=[1.0, 0.5])
    assert other.reference_key == plain.reference_key
    assert control.store.stats().misses == 1
    assert np.abs(other.images - plain.images).mean() > 50 * TOLERANCE
    assert other.metadata["reference_weights"] == [[1.0, 0.5]]


def test_a_weight_of_zero_is_as_if_nothing_attended_to_it(control: Pipeline) -> None:
    """All of them: as text to image. The last: as a draw without it, for joint references bit by bit alike otherwise."""
    none = draw(control, reference_weights=[0, 0.0])
    text = draw(control, image=None)
    assert np.abs(none.images - text.images).mean() <= TOLERANCE
    if control.kind.joint:
        first = draw(control, image=REFERENCES[:1])
        assert np.abs(draw(control, reference_weights=[1, 0]).images - first.images).mean() <= TOLERANCE


def test_weights_of_steps(control: Pipeline) -> None:
    for alike in ([[0.5, 2.0]], [[0.5, 2.0]] * 4):
        assert np.array_equal(
            draw(control, reference_weights=alike).images, draw(control, reference_weights=[0.5, 2]).images
        )
    early = draw(control, reference_weights=[[0.5, 2.0], [1, 1], [1, 1], [1, 1]]).images
    assert np.abs(early - draw(control).images).mean() > TOLERANCE
    assert np.abs(early - draw(control, reference_weights=[0.5, 2]).images).mean() > TOLERANCE


def test_reference_guidance_is_its_formula(control: Pipeline) -> None:
    """One step by hand: v_without + r (v_with - v_without)."""
    assert np.array_equal(draw(control, reference_guidance=1.0).images, draw(control).images)
    noise, txt = torch.randn(1, 16, 4, 5), torch.randn(1, 9, 48)
    out = control(
        prompt_embeds=txt,
        image=REFERENCES,
        latents=noise,
        sigmas=[1.0],
        num_inference_steps=1,
        reference_guidance=1.5,
        output_type="latent",
    )
    refs = control.prefill(REFERENCES)
    ids = {"img_ids": image_ids((4, 5)), "txt_ids": text_ids(9)}
    tokens = noise.flatten(2).transpose(1, 2)
    with torch.no_grad():
        if refs.tokens is not None:
            grids = [(h // 16, w // 16) for w, h in refs.sizes]
            from limner.tokens import reference_ids

            held: dict[str, Any] = {"ref_tokens": refs.tokens, "ref_ids": reference_ids(grids)}
        else:
            held = {"references": refs}
        v, without = control.transformer(tokens, txt, 1.0, **ids, **held), control.transformer(tokens, txt, 1.0, **ids)
    clean = (tokens - (without + 1.5 * (v - without))).transpose(1, 2).reshape(1, 16, 4, 5)
    assert relative_error(out.images, control.autoencoder.denormalise(clean)) <= 1e-5
    assert out.metadata["reference_guidance"] == 1.5


def test_requests_with_other_weights_share_references(control: Pipeline) -> None:
    prepared = control._prefiller.prepare(REFERENCES)
    requests = [
        EditRequest(prompt="a dog", seeds=(1,), references=prepared, control={"reference_weights": weights})
        for weights in (None, (0.5, 1.0), (1.0, 1.5))
    ]
    keys = {control.draw([request], output_type="latent").reference_key for request in requests}
    assert len(keys) == 1
    assert control.store.stats().misses == 1
    together = control.draw(requests, output_type="latent")
    for i, request in enumerate(requests):
        alone = control.draw([request], output_type="latent")
        assert (
            relative_error(together.images[i : i + 1], alone.images) <= 1e-5
        )  # float32, other batches round otherwise
        assert together.metadata_of(i) == alone.metadata
    assert relative_error(together.images[:1], together.images[1:2]) > 1e-3
    assert control.store.stats().misses == 1
    with pytest.raises(InvalidRequest, match=r"reference_guidance: 1\.5 and 1\.0 cannot be drawn together"):
        control.draw([requests[0], replace(requests[0], control={"reference_guidance": 1.5})])


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"reference_weights": [1.0]}, "there are 1 for 2 references; give one for each"),
        ({"reference_weights": [1.0, -1]}, "are not numbers of 0 to 10"),
        ({"reference_weights": 0.5}, "are not numbers|there are 1 for 2"),
        ({"reference_weights": [[1, 1]] * 3 + [[1]]}, "there are 1 for 2 references"),
        ({"reference_weights": [[1, 1]] * 3}, "there are lists for 3 of 4 steps"),
        ({"reference_guidance": -1}, "reference_guidance: -1 is not a number of 0 to 10"),
        ({"reference_guidance": 1.5, "image": None}, "reference_guidance: needs references"),
    ],
)
def test_what_is_refused(how: dict[str, Any], problem: str, pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        draw(pipe, **how)
