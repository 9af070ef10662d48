"""Noise levels of a run, and the Euler step, as pure functions. Knows nothing of models.

The formulas are those of diffusers 0.42.1: `compute_empirical_mu` of the klein pipelines and the exponential time shift
of `FlowMatchEulerDiscreteScheduler`, in the same precision (float32 levels, float64 mu).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner.errors import CheckpointError, InvalidRequest

__all__ = ["Schedule", "empirical_mu", "euler_step"]

_SLOPE_200, _OFFSET_200 = 0.00016927, 0.45666666
_SLOPE_10, _OFFSET_10 = 8.73809524e-05, 1.89833333
MAX_STEPS = 1000
"""The number of noise levels in training; more steps are refused."""
_LONG = 4300
"""Above this many tokens mu no longer depends on the number of steps."""


def empirical_mu(num_tokens: int, *, num_inference_steps: int) -> float:
    """Return mu, the exponent of the time shift, for `num_tokens` output tokens and `num_inference_steps` steps."""
    m_200 = _SLOPE_200 * num_tokens + _OFFSET_200
    if num_tokens > _LONG:
        return m_200
    m_10 = _SLOPE_10 * num_tokens + _OFFSET_10
    a = (m_200 - m_10) / 190.0
    return a * num_inference_steps + (m_200 - 200.0 * a)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How noise levels are shifted: by mu, which depends on the number of tokens (klein), or by a fixed `static_shift`."""

    dynamic: bool = True
    static_shift: float = 1.0

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], *, where: str = "scheduler_config.json") -> Schedule:
        """Read a `FlowMatchEulerDiscreteScheduler` configuration. Raises `CheckpointError` for what no klein model uses."""
        allowed: dict[str, Any] = {
            "num_train_timesteps": 1000,
            "time_shift_type": "exponential",
            "shift_terminal": None,
            "invert_sigmas": False,
            "stochastic_sampling": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        }
        for name, value in allowed.items():
            found = config.get(name, value)
            if found != value and (found or value):
                raise CheckpointError(f"{where}: {name}={found!r} is not supported; allowed: {value!r}")
        kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if kind != "FlowMatchEulerDiscreteScheduler":
            raise CheckpointError(f"{where}: {kind} is not supported; allowed: FlowMatchEulerDiscreteScheduler")
        static = config.get("shift", 1.0)
        if not isinstance(static, (int, float)) or not 0 < static < math.inf:
            raise CheckpointError(f"{where}: shift={static!r} has to be a number over 0")
        return cls(dynamic=bool(config.get("use_dynamic_shifting", False)), static_shift=float(static))

    def sigmas(self, num_tokens: int, *, num_inference_steps: int, custom: Sequence[float] | None = None) -> Tensor:
        """Return the noise levels of a run, float32, shape (steps + 1,), from 1 (or the first custom level) down to 0.

        `custom` replaces linspace(1, 1 / N, N), N = num_inference_steps, before the shift, as in diffusers; mu is
        still computed from N. Raises `InvalidRequest` unless the levels fall strictly within (0, 1].
        """
        if not 1 <= num_inference_steps <= MAX_STEPS:
            raise InvalidRequest(
                "num_inference_steps", f"{num_inference_steps} is not within 1 to {MAX_STEPS}; klein takes 4"
            )
        if custom is None:
            levels = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        else:
            try:
                levels = np.asarray(custom, dtype=np.float64)
            except (TypeError, ValueError):
                raise InvalidRequest(
                    "sigmas", f"{custom!r} is not a list of numbers; use for example [1.0, 0.5]"
                ) from None
            falling = levels.ndim == 1 and levels.size > 0 and bool(np.all(np.diff(levels) < 0))
            if not (falling and levels[-1] > 0 and levels[0] <= 1):
                raise InvalidRequest("sigmas", f"{custom!r} has to fall strictly within (0, 1], for example [1.0, 0.5]")
        levels = levels.astype(np.float32)
        if self.dynamic:
            e_mu = math.exp(empirical_mu(num_tokens, num_inference_steps=num_inference_steps))
            levels = e_mu / (e_mu + (1 / levels - 1))
        else:
            levels = self.static_shift * levels / (1 + (self.static_shift - 1) * levels)
        return torch.from_numpy(np.append(levels.astype(np.float32), np.float32(0)))


def euler_step(sample: Tensor, velocity: Tensor, *, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step of dx/dsigma = velocity: `sample` + (next_sigma - sigma) velocity, in float32."""
    return sample.float() + (next_sigma - sigma) * velocity.float()
