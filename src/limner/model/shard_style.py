"""A style of `parallelize_module` that leaves a matrix with the part of this process.

Torch's column style treats a matrix as one piece, and some matrices here are several in one: a gated MLP has two halves,
and a single-stream block q, k, v and both halves. The parts are plain tensors, not DTensors, because products of parts,
int8 and the kernels in C take nothing else. A module of its own: torch's part of it takes a second to import.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear
from limner.model.shards import MatrixShard, check_no_gradient, peer_errors

__all__ = ["shard_matrices"]


def shard_matrices(network: nn.Module, mesh: DeviceMesh, shards: dict[str, MatrixShard]) -> None:
    """Divide the matrices of a network, in place; `shards` are by patterns of their names."""
    plan: dict[str, ParallelStyle] = {name: _ShardStyle(shard) for name, shard in shards.items()}
    parallelize_module(network, mesh, plan)


class _ShardStyle(ParallelStyle):
    """Of one `Linear` or `Int8Linear`; products of parts along K are summed over the processes."""

    def __init__(self, shard: MatrixShard) -> None:
        self.shard = shard

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, (Linear, Int8Linear))
        place = {"rank": device_mesh.get_local_rank(), "size": device_mesh.size()}
        weight = self.shard.part(module.weight.detach(), **place)
        if isinstance(module, Int8Linear):
            module.weight = weight
            if self.shard.dim == 0:
                module.weight_scale = self.shard.part(module.weight_scale, **place)
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)
        module.out_features, module.in_features = weight.shape
        if self.shard.dim == 1:
            group = device_mesh.get_group()

            def total(module: nn.Module, args: Any, product: Tensor) -> Tensor:
                check_no_gradient(product)
                with peer_errors():
                    dist.all_reduce(product, group=group)
                return product

            module.register_forward_hook(total)
        return module
