"""What the configuration of an adapter says: the scale of each update, and what makes the tensors mean something else.

The scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA. The rank is that of the tensors. Knows no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from limner.errors import CheckpointError

__all__ = ["Scales"]

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the weights of the model as they are (peft/tuners/lora/layer.py)."""
_TYPES = ("LORA", "LOKR", "LOHA")
_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT with which an update is more than the product of its tensors."""


class Scales:
    """The scales in a configuration of PEFT or diffusers. Patterns of names may have alphas of their own.

    `where` names the file in messages. Raises `CheckpointError`, also for what changes the meaning of the tensors.
    """

    def __init__(self, config: Mapping[str, Any], *, where: str) -> None:
        self._config, self._where = config, where
        self._used: set[str] = set()
        if config.get("use_dora"):
            raise CheckpointError(f"lora: {where}: is a DoRA (use_dora), which is not supported; use a plain LoRA")
        kind = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
        if kind not in _TYPES:
            raise CheckpointError(
                f"lora: {where}: peft_type={config['peft_type']!r} is not supported; allowed: {', '.join(_TYPES)}; "
                "merge it into its model with PEFT, and give the merged model"
            )
        for name in _VARIANTS:
            if config.get(name):
                raise CheckpointError(
                    f"lora: {where}: {name} in its configuration makes more of it than a product of its tensors, which is "
                    "not supported; use a plain LoRA"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, (bool, str, type(None))) and start in _PLAIN_STARTS:
            return
        raise CheckpointError(
            f"lora: {where}: init_lora_weights={start!r}: it was trained on weights that its start was taken out of (as "
            "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do), and added to others it is wrong; let PEFT write it as a plain one:"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )

    @property
    def unused_patterns(self) -> list[str]:
        """Patterns of alphas that fitted no name so far."""
        patterns = self._config.get("alpha_pattern")
        return sorted(set(patterns) - self._used) if isinstance(patterns, dict) else []

    def of(self, names: Sequence[str], rank: int | None) -> float | None:
        """Return the scale of a matrix with this rank; None: the configuration does not say.

        `names` are those that a pattern may have: its name in the file, without the prefix, as PEFT reads patterns, then
        that of diffusers.
        """
        config, alpha_name = self._config, "lora_alpha" if "lora_alpha" in self._config else "alpha"
        alpha = self._look_up(names, "alpha_pattern", config.get(alpha_name))
        given = config.get("r", rank)
        if rank is None:
            given = self._look_up(names, "rank_pattern", given)
        if alpha is None or given is None:
            return None
        divisor = self._number(given, "r")
        if divisor == 0:
            raise CheckpointError(f"lora: {self._where}: r={given!r} in its configuration has to be at least 1")
        divisor = divisor if rank is None else rank
        return self._number(alpha, alpha_name) / (math.sqrt(divisor) if config.get("use_rslora") else divisor)

    def _look_up(self, names: Sequence[str], field: str, otherwise: object) -> object:
        """Return the value of the first pattern that matches a name, as PEFT reads patterns."""
        patterns = self._config.get(field)
        patterns = patterns if isinstance(patterns, dict) else {}
        for name in names:
            for pattern, value in patterns.items():
                try:
                    text = str(pattern)  # others, and many stars, would take exponential time
                    if not re.fullmatch(r"[\w.^*$]{0,500}", text) or text.count("*") > 3:
                        raise re.error("it may hold letters, digits, _ . ^ $ and up to three *")
                    if re.match(rf"(.*\.)?({pattern})$", name):
                        self._used.add(pattern)
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
