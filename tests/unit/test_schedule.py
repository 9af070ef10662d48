"""Noise levels against the published values and against diffusers' scheduler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import compute_empirical_mu

from limner import CheckpointError, InvalidRequest
from limner.schedule import Schedule, empirical_mu, euler_step


def test_published_levels_of_klein() -> None:
    """4 steps at 1024x1024 (4096 tokens)."""
    levels = Schedule().sigmas(4096, num_inference_steps=4)
    assert [round(x, 4) for x in levels.tolist()] == [1.0, 0.9674, 0.9081, 0.7672, 0.0]


@pytest.mark.parametrize("num_tokens", [16, 64, 1024, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("num_inference_steps", [1, 4, 50])
@pytest.mark.parametrize("static", [False, True])
def test_same_bits_as_diffusers(num_tokens: int, num_inference_steps: int, static: bool) -> None:
    config = {"use_dynamic_shifting": not static, "shift": 3.0}
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    mu = compute_empirical_mu(num_tokens, num_inference_steps)
    assert empirical_mu(num_tokens, num_inference_steps=num_inference_steps) == mu
    for custom in (None, [0.9, 0.5, 0.05]):
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if custom is None else custom
        theirs.set_timesteps(sigmas=sigmas, mu=mu)
        ours = Schedule.from_diffusers(config).sigmas(
            num_tokens, num_inference_steps=num_inference_steps, custom=custom
        )
        assert torch.equal(ours, theirs.sigmas)


def test_euler_step() -> None:
    sample, velocity = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    stepped = euler_step(sample, velocity, sigma=torch.tensor(0.8), next_sigma=torch.tensor(0.3))
    torch.testing.assert_close(stepped, torch.tensor([0.75, 2.5]))
    assert (
        euler_step(sample.bfloat16(), velocity.bfloat16(), sigma=torch.tensor(1.0), next_sigma=torch.tensor(0.9)).dtype
        == torch.float32
    )


@pytest.mark.parametrize("custom", [[], [0.5, 0.5], [0.2, 0.5], [1.1, 0.5], [1.0, 0.0], [float("nan")]])
def test_refuses_levels(custom: list[float]) -> None:
    with pytest.raises(InvalidRequest, match="sigmas"):
        Schedule().sigmas(64, num_inference_steps=4, custom=custom)


@pytest.mark.parametrize(
    "config",
    [
        {"shift_terminal": 0.02},
        {"time_shift_type": "linear"},
        {"use_karras_sigmas": True},
        {"num_train_timesteps": 500},
    ],
)
def test_refuses_schedulers_that_it_would_get_wrong(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{next(iter(config))}=.* is not supported; allowed"):
        Schedule.from_diffusers(config)
