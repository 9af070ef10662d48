"""LoRAs of a pipeline, from files to the adapters of its transformer: what diffusers' methods do beyond `Adapters`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from limner.errors import InvalidRequest
from limner.model.divide import Sharding
from limner.model.lora import matrix_shapes
from limner.pipeline.networks import Networks
from limner.weights.lora import load_lora

__all__ = ["LoraSource", "check_components", "load_adapter"]

LoraSource = str | os.PathLike[str] | Mapping[str, Tensor]


def load_adapter(
    networks: Networks, source: LoraSource, name: str | None, *, weight_name: str | None, strict: bool
) -> None:
    """Load a LoRA and add this process's part of it to the transformer's adapters. Raises as `load_lora_weights` does."""
    sharding = Sharding(config=networks.transformer.config, ranks=networks.ranks)
    shapes = {key: sharding.whole_shape(key, shape) for key, shape in matrix_shapes(networks.transformer).items()}
    lora = load_lora(source, shapes=shapes, weight_name=weight_name, strict=strict)
    updates = {key: sharding.part_of_update(key, update) for key, update in lora.updates.items()}
    networks.adapters.add(replace(lora, updates=updates), name)


def check_components(components: Sequence[str]) -> None:
    """Raise `InvalidRequest` unless `components` names the part that has LoRAs."""
    if list(components) != ["transformer"]:
        raise InvalidRequest("components", f"{list(components)} has to be ['transformer'], the part that has LoRAs")
