"""The LoRA methods of a pipeline, with diffusers' names and meanings. What acts and how strongly, `Adapters` decides.

Each function is a method of `Pipeline`, by `LoraMethods`; it needs nothing of it but the networks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from limner.errors import InvalidRequest
from limner.model.divide import Sharding
from limner.model.lora import matrix_shapes
from limner.pipeline.memory_errors import typed_memory_errors
from limner.pipeline.networks import Networks
from limner.weights.lora import load_lora

__all__ = [
    "HasNetworks",
    "LoraMethods",
    "delete_adapters",
    "disable_lora",
    "enable_lora",
    "fuse_lora",
    "get_active_adapters",
    "get_list_adapters",
    "load_lora_weights",
    "set_adapters",
    "unfuse_lora",
    "unload_lora_weights",
]


class HasNetworks(Protocol):
    """What has LoRAs."""

    @property
    def networks(self) -> Networks: ...


@typed_memory_errors
def load_lora_weights(
    self: HasNetworks,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    strict: bool = True,
) -> None:
    """Load a LoRA of the transformer: a .safetensors file, a folder or hub id, or tensors by name.

    It acts at once and alone, with strength 1; `set_adapters` lets several act. It runs alongside the weights, which may
    be quantized. `adapter_name` left out is default_0, default_1, ...; `weight_name` is the file of a folder or hub id.
    Tensors that are not for this transformer are an error that names them; `strict=False` logs them. References that were
    prefilled with other LoRAs, or strengths, are refused. Raises `CheckpointError`, `InvalidRequest`.
    """
    source, networks = pretrained_model_name_or_path_or_dict, self.networks
    sharding = Sharding(config=networks.transformer.config, ranks=networks.ranks)
    shapes = {name: sharding.whole_shape(name, shape) for name, shape in matrix_shapes(networks.transformer).items()}
    base = None if networks.ranks.shard is not None else networks.adapters.base_weight
    lora = load_lora(source, shapes=shapes, weight_name=weight_name, strict=strict, base=base)
    updates = {name: sharding.part_of_update(name, update) for name, update in lora.updates.items()}
    networks.adapters.add(replace(lora, updates=updates), adapter_name)


@typed_memory_errors
def set_adapters(
    self: HasNetworks, adapter_names: Sequence[str] | str, adapter_weights: float | Sequence[float] | None = None
) -> None:
    """Let these adapters act, and no others, each with its weight; one number is for all, None is 1."""
    self.networks.adapters.set(adapter_names, adapter_weights)


def get_active_adapters(self: HasNetworks) -> list[str]:
    """Return the names of the adapters that act."""
    return self.networks.adapters.active


def get_list_adapters(self: HasNetworks) -> dict[str, list[str]]:
    """Return the names of the adapters that are loaded, by part."""
    names = self.networks.adapters.names
    return {"transformer": names} if names else {}


def delete_adapters(self: HasNetworks, adapter_names: Sequence[str] | str) -> None:
    """Forget adapters. If one is left and none would be active, that one becomes active, as in diffusers."""
    self.networks.adapters.delete(adapter_names)


def unload_lora_weights(self: HasNetworks) -> None:
    """Forget all adapters. Fused ones stay in the weights, as in diffusers, until `unfuse_lora`."""
    self.networks.adapters.clear()


@typed_memory_errors
def disable_lora(self: HasNetworks) -> None:
    """Let no adapter act, fused or not, until `enable_lora`; they stay loaded, active and fused in name."""
    self.networks.adapters.disable()


@typed_memory_errors
def enable_lora(self: HasNetworks) -> None:
    """Let adapters act again after `disable_lora`."""
    self.networks.adapters.enable()


@typed_memory_errors
def fuse_lora(
    self: HasNetworks,
    components: Sequence[str] = ("transformer",),
    lora_scale: float = 1.0,
    safe_fusing: bool = True,
    adapter_names: Sequence[str] | None = None,
) -> None:
    """Add adapters, the active ones or `adapter_names`, times `lora_scale`, to the weights, in float32, rounded once.

    Nothing runs alongside the weights then, and the weights are in memory twice: `unfuse_lora` needs the old ones. Sums
    that are not finite are always refused (`safe_fusing`). Not for int8 weights. Refused where other adapters are active
    for the same matrices: diffusers would let them stop there.
    """
    _check_components(components)
    self.networks.adapters.fuse(adapter_names, lora_scale)


def unfuse_lora(self: HasNetworks, components: Sequence[str] = ("transformer",)) -> None:
    """Put the tensors back that were there before `fuse_lora`; adapters act alongside them again."""
    _check_components(components)
    self.networks.adapters.unfuse()


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise InvalidRequest("components", f"{list(components)} has to be ['transformer'], the part that has LoRAs")


class LoraMethods:
    """The methods of what has networks."""

    load_lora_weights = load_lora_weights
    set_adapters = set_adapters
    get_active_adapters = get_active_adapters
    get_list_adapters = get_list_adapters
    delete_adapters = delete_adapters
    unload_lora_weights = unload_lora_weights
    fuse_lora = fuse_lora
    unfuse_lora = unfuse_lora
    disable_lora = disable_lora
    enable_lora = enable_lora

    @property
    def fused_loras(self: HasNetworks) -> set[str]:
        """The names of adapters that are fused."""
        return set(self.networks.adapters.fused)

    @property
    def num_fused_loras(self: HasNetworks) -> int:
        return len(self.networks.adapters.fused)
