"""The scale of each update, from the configuration of an adapter: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from limner.errors import CheckpointError

__all__ = ["Scales"]


class Scales:
    """The scales in a configuration of PEFT or diffusers. Patterns of names may have alphas and ranks of their own.

    `where` names the file in messages. Raises `CheckpointError`.
    """

    def __init__(self, config: Mapping[str, Any], *, where: str) -> None:
        if config.get("use_dora"):
            raise CheckpointError(f"lora: {where}: is a DoRA (use_dora), which is not supported; use a plain LoRA")
        self._config, self._where = config, where
        self._alpha_name = "lora_alpha" if "lora_alpha" in config else "alpha"

    def of(self, target: str, rank: int | None) -> float | None:
        """Return the scale of a matrix; `rank` is that of its tensors. None: the configuration does not say."""
        config = self._config
        alpha = self._look_up(target, config.get("alpha_pattern"), config.get(self._alpha_name))
        ranks = self._look_up(target, config.get("rank_pattern"), config.get("r", rank))
        if alpha is None or ranks is None:
            return None
        divisor = self._number(ranks, "r")
        if divisor == 0:
            raise CheckpointError(f"lora: {self._where}: r={ranks!r} in its configuration has to be at least 1")
        return self._number(alpha, self._alpha_name) / (math.sqrt(divisor) if config.get("use_rslora") else divisor)

    def _look_up(self, name: str, patterns: object, otherwise: object) -> object:
        """Return the value of the first pattern that matches the name, as PEFT reads patterns."""
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            try:
                if not re.fullmatch(r"[\w.^*$]*", str(pattern)):  # some other patterns would take exponential time
                    raise re.error("it may hold letters, digits, _ . ^ * $")
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
            except re.error as error:
                raise CheckpointError(
                    f"lora: {self._where}: pattern {pattern!r} in its configuration is not supported ({error})"
                ) from error
        return otherwise

    def _number(self, value: object, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"lora: {self._where}: {name}={value!r} in its configuration has to be a number")
        return float(value)
