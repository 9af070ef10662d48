"""Requests that are drawn together, as the engine, batches and the command line draw them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.tiny import generators, picture

from limner import InvalidRequest, Pipeline
from limner.images import PreparedReference, prepare_reference
from limner.pipeline.noise import draw_seeds
from limner.requests import EditRequest


def prepared(pipe: Pipeline, *seeds: int) -> tuple[PreparedReference, ...]:
    return tuple(prepare_reference(picture(64, 80, seed=seed), policy=pipe.reference_policy) for seed in seeds)


def test_requests_are_one_call(pipe: Pipeline) -> None:
    """An image for each seed, in order: the picture of a call with these arguments."""
    references = prepared(pipe, 1, 2)
    requests = [
        EditRequest(prompt="a hat", seeds=(3, 4), references=references, num_inference_steps=2),
        EditRequest(prompt="a scarf", seeds=(5,), references=references, num_inference_steps=2),
    ]
    heard: list[tuple[str, int, int]] = []
    steps: list[int] = []

    def after_step(own: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        assert own is pipe
        assert set(tensors) == {"denoised"}
        steps.append(step)

    out = pipe.draw(
        requests,
        output_type="pt",
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["denoised"],
        progress=lambda *what: heard.append(what),
    )
    expected = pipe(
        ["a hat", "a hat", "a scarf"],
        image=list(references),
        num_inference_steps=2,
        generator=generators(3, 4, 5),
        output_type="pt",
    )
    assert torch.equal(out.images, expected.images)
    assert out.images.shape == (3, 3, 80, 64)
    assert (out.seeds, out.reference_cache, steps) == ((3, 4, 5), "miss", [0, 1])
    assert ("step", 2, 2) in heard


def test_references_that_were_prefilled_before(pipe: Pipeline) -> None:
    pictures = prepared(pipe, 1)
    request = EditRequest(prompt="a hat", seeds=(3,), width=64, height=64, num_inference_steps=1)
    given = pipe.draw([request], references=pipe.prefill(list(pictures)), output_type="latent")
    found = pipe.draw([replace(request, references=pictures)], output_type="latent")
    assert torch.equal(given.images, found.images)
    assert (given.reference_cache, found.reference_cache) == ("given", "memory")
    assert pipe.draw([request]).reference_cache == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds: there are none"),
        ({"width": 80}, "width: 80 and 64 cannot be drawn together"),
        ({"height": None}, "height: 80 and 64 cannot be drawn together"),
        ({"num_inference_steps": 3}, "num_inference_steps: 3 and 1 cannot be drawn together"),
        ({"references": "other"}, "references: those of the requests differ"),
        ({"prompt": " "}, "prompt: ' ' is empty"),
    ],
    ids=str,
)
def test_refuses(change: dict[str, Any], message: str, pipe: Pipeline) -> None:
    first = EditRequest(
        prompt="a hat", seeds=(3,), references=prepared(pipe, 1), width=64, height=64, num_inference_steps=1
    )
    if "references" in change:
        change = {"references": prepared(pipe, 2)}
    with pytest.raises(InvalidRequest, match=message):
        pipe.draw([first, replace(first, **change)])
    with pytest.raises(InvalidRequest, match="requests: there are none"):
        pipe.draw([])


def test_new_seeds_differ(pipe: Pipeline) -> None:
    ranks = pipe.networks.ranks
    seeds = {*draw_seeds(4, ranks=ranks), *draw_seeds(4, ranks=ranks)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
