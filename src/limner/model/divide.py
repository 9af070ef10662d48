"""Divide one transformer among several processes: which part of each matrix a process has.

All processes make the same calls with the same inputs and get the same results. Two ways to divide the work:

- ``tensor``: each process has 1/n of the heads and of the MLP. Projections into heads and MLP are divided by output
  features, projections back to the stream by input features, and the products of the latter are summed over the processes:
  four sums per double-stream block and one per single-stream block, each the size of its tokens. Each process keeps the
  K/V of its own heads, 1/n of those of the references. Modulation, embedders and the last layer are whole in each process.
- ``sequence``: each process has all weights and 1/n of the text and image tokens. Keys and values of a layer are gathered
  before its attention; no other part of a block sees more than one token. References are divided in the same way while they
  are prefilled, and each process keeps all of their K/V, which are gathered for attention anyway.

Shapes: weight (N, K). Knows the transformer's matrices by name. Does not know files; messages between processes and the
division of tokens are in `limner.model.shards`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from limner.config import TransformerConfig
from limner.errors import InvalidRequest
from limner.model.arithmetic import fast_dtype
from limner.model.attention import choose_kernel
from limner.model.lora import Kronecker, Update
from limner.model.shards import MatrixShard, RankGroup, Ranks
from limner.model.transformer import Transformer

__all__ = ["Sharding", "agree_on_arithmetic", "divide", "matrix_shards"]


def matrix_shards(config: TransformerConfig) -> dict[str, MatrixShard]:
    """Return how matrices are divided in tensor mode, by patterns of their names; all others are whole in each process."""
    width, mlp = config.width, config.mlp_width
    rows, columns = MatrixShard(dim=0, blocks=(width,)), MatrixShard(dim=1, blocks=(width,))
    double = {
        "attn": dict.fromkeys(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"), rows)
        | dict.fromkeys(("to_out.0", "to_add_out"), columns)
    }
    for name in ("ff", "ff_context"):
        double[name] = {
            "linear_in": MatrixShard(dim=0, blocks=(mlp, mlp)),
            "linear_out": MatrixShard(dim=1, blocks=(mlp,)),
        }
    found = {f"transformer_blocks.*.{part}.{name}": shard for part, of in double.items() for name, shard in of.items()}
    single = "single_transformer_blocks.*.attn"
    found[f"{single}.to_qkv_mlp_proj"] = MatrixShard(dim=0, blocks=(width, width, width, mlp, mlp))
    found[f"{single}.to_out"] = MatrixShard(dim=1, blocks=(width, mlp))
    return found


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Which part of each matrix of a transformer this process has. With whole weights all is returned unchanged."""

    config: TransformerConfig
    ranks: Ranks

    def of(self, name: str) -> MatrixShard | None:
        """Return how the matrix with this name is divided; None if it is whole here."""
        if self.ranks.shard is None:
            return None
        return next((s for pattern, s in matrix_shards(self.config).items() if fnmatchcase(name, pattern)), None)

    def check(self) -> None:
        """Raise `InvalidRequest` unless the model can be divided into so many equal parts."""
        if self.ranks.shard is None:
            return
        counts = {"num_heads": self.config.num_heads, "mlp_width": self.config.mlp_width}
        for name, value in counts.items():
            if value % self.ranks.size:
                common = math.gcd(*counts.values())
                allowed = [str(n) for n in range(1, common + 1) if not common % n]
                raise InvalidRequest(
                    "parallel",
                    f"{name}={value} cannot be divided by {self.ranks.size} processes; allowed for tensor: "
                    f"{', '.join(allowed)}; start as many (torchrun --nproc-per-node), or use sequence",
                )

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's part of a tensor of the whole transformer's state dict."""
        module, _, kind = name.rpartition(".")
        shard = self.of(module)
        if shard is None or (kind == "weight_scale" and shard.dim == 1):  # a scale per row, and rows are whole
            return tensor
        return shard.part(tensor, rank=self.ranks.rank, size=self.ranks.size)

    def whole_shape(self, name: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the (N, K) of the whole matrix of which this process has a part of `shape`."""
        shard = self.of(name)
        if shard is None:
            return shape
        size = self.ranks.size
        return (shape[0] * size, shape[1]) if shard.dim == 0 else (shape[0], shape[1] * size)

    def part_of_update(self, name: str, update: Update) -> Update:
        """Return this process's part of what a LoRA adds to a matrix. Raises `InvalidRequest` if it cannot be divided."""
        shard = self.of(name)
        if shard is None:
            return update
        if isinstance(update, Kronecker):
            raise InvalidRequest(
                "lora",
                f"{name} has a LoKr update, which cannot be cut for parallel='tensor'; use 'sequence', or one process",
            )
        # rows are those of one side of a product, columns those of the other
        whole = "down" if shard.dim == 0 else "up"
        return update.with_tensors(
            {
                name: t if name.startswith(whole) else shard.part(t, rank=self.ranks.rank, size=self.ranks.size)
                for name, t in update.tensors.items()
            }
        )


def divide(transformer: Transformer, ranks: Ranks) -> None:
    """Leave a transformer, which may be on the meta device, with this process's part. Raises `InvalidRequest`."""
    sharding = Sharding(config=transformer.config, ranks=ranks)
    sharding.check()
    if isinstance(ranks, RankGroup) and ranks.shard is not None:
        from limner.model.shard_style import shard_matrices  # takes a second to import

        shard_matrices(transformer, ranks.mesh, matrix_shards(transformer.config))
    transformer.use(ranks=ranks)


def agree_on_arithmetic(transformer: Transformer, ranks: Ranks) -> None:
    """Give all processes the attention kernel and the dtype of products that process 0 would choose.

    Both may be measured, and machines may differ. If not all processes have the kernel, all use one that runs everywhere:
    the chunked one on CPUs, torch's own elsewhere; and torch's products if not all have AMX tiles. A process alone chooses
    when it computes. Raises `InvalidRequest` where the rest of their arithmetic differs, as of int8 on machines with and
    without a compiler.
    """
    if ranks.alone:
        return
    device, dtype = transformer.device, transformer.dtype
    found = ranks.all_gather((choose_kernel(device, dtype, transformer.config.head_dim), fast_dtype(device, dtype)))
    kernel, products = found[0]
    if any(other != kernel for other, _ in found):
        on_cpu = "chunked" if products == dtype else "chunked_float32"
        kernel = on_cpu if device.type == "cpu" else "sdpa"
    transformer.use(kernel=kernel)
    transformer.use_arithmetic(products)
    if len(set(ranks.all_gather(transformer.x_embedder.arithmetic_name(device)))) > 1:
        transformer.use_arithmetic(products, tiled=False)
    names = ranks.all_gather(transformer.arithmetic)
    if len(set(names)) > 1:
        raise InvalidRequest(
            "parallel",
            f"processes multiply differently ({'; '.join(sorted(set(names)))}), so their parts of K/V do not fit together; "
            "limner doctor on each machine says what it lacks",
        )
