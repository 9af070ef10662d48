"""The denoising loop: what a step callback sees, changes and stops."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.support.tiny import generators, picture

from limner import Cancelled, InvalidRequest, NumericalError, Pipeline


def test_callback_sees_and_changes_tensors(pipe: Pipeline) -> None:
    seen = []

    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert owner is pipe
        seen.append((i, round(float(t), 1), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else {}

    out = pipe(
        "a dog",
        height=64,
        width=64,
        callback_on_step_end=callback,
        output_type="latent",
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert seen[0] == (0, 1000.0, {"latents", "prompt_embeds"})
    zero = pipe.autoencoder.denormalise(torch.zeros(1, 16, 4, 4))
    assert torch.equal(out.images, zero)


def test_callback_stops_the_run(pipe: Pipeline) -> None:
    steps = []

    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        steps.append(i)
        if i == 1:
            raise Cancelled("the user stopped it")

    with pytest.raises(Cancelled, match="the user stopped it"):
        pipe("a dog", height=64, width=64, callback_on_step_end=callback)
    assert steps == [0, 1]
    assert pipe("a dog", height=64, width=64).images


def test_diffusers_way_to_stop(pipe: Pipeline) -> None:
    steps = []

    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(i)
        owner._interrupt = i == 1
        return tensors

    assert len(pipe("a dog", height=64, width=64, callback_on_step_end=callback).timings.steps) == 2
    assert steps == [0, 1]
    assert len(pipe("a dog", height=64, width=64).timings.steps) == 4


def test_a_call_is_stopped_by_its_own_callback_alone(pipe: Pipeline) -> None:
    """One call is inside its second step while another, in another thread, begins, stops itself and ends."""
    inside, other_ended = threading.Event(), threading.Event()

    def wait(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if i == 1:
            inside.set()
            assert other_ended.wait(60)
            assert not owner._interrupt

    def stop(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        owner._interrupt = True

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pipe, "a dog", height=64, width=64, callback_on_step_end=wait)
        assert inside.wait(60)
        try:
            assert len(pipe("a cat", height=64, width=64, callback_on_step_end=stop).timings.steps) == 1
            assert pipe._interrupt  # of this thread's last call, as with diffusers
        finally:
            other_ended.set()
        assert len(waiting.result().timings.steps) == 4


def test_a_call_begins_without_stopping_or_being_started_again_by_another(pipe: Pipeline) -> None:
    def call_again(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        owner._interrupt = True
        assert len(owner("a cat", height=64, width=64).timings.steps) == 4

    assert len(pipe("a dog", height=64, width=64, callback_on_step_end=call_again).timings.steps) == 1


def test_a_thread_that_does_not_draw_stops_what_runs(pipe: Pipeline) -> None:
    def press(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if i == 1:
            with ThreadPoolExecutor(1) as threads:  # a stop button's thread
                threads.submit(setattr, owner, "_interrupt", True).result()

    assert len(pipe("a dog", height=64, width=64, callback_on_step_end=press).timings.steps) == 2


def test_refuses_what_a_callback_gives_back(pipe: Pipeline) -> None:
    def callback(owner: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.zeros(1, 3, 48)}

    with pytest.raises(InvalidRequest, match="callback_on_step_end: gave back prompt_embeds that are not"):
        pipe("a dog", height=64, width=64, callback_on_step_end=callback)


def test_values_that_are_not_finite_are_an_error(pipe: Pipeline) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite in torch.float32: the weights are damaged"):
        pipe("a dog", height=64, width=64)


def test_a_callback_may_drop_images_of_a_batch(pipe: Pipeline) -> None:
    def drop(pipe: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"rows": [0, 2]} if step == 1 else {}

    options: dict[str, Any] = {"image": picture(64, 64), "output_type": "pt", "num_images_per_prompt": 3}
    whole = pipe("a dog", generator=generators(1, 2, 3), **options)
    kept = pipe("a dog", generator=generators(1, 2, 3), callback_on_step_end=drop, **options)
    assert kept.seeds == (1, 3)
    assert (kept.images - whole.images[[0, 2]]).abs().max() < 1e-5  # another batch, other roundings
    for bad in ([], [2, 0], [0, 3], [1, 1]):
        with pytest.raises(InvalidRequest, match="rows"):
            pipe(
                "a dog",
                generator=generators(1, 2, 3),
                callback_on_step_end=lambda *a, bad=bad: {"rows": bad},
                **options,
            )
