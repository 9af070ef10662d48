"""What processes of one parallel model do in tests. Imports little: each process does that anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from limner.errors import InvalidRequest
from limner.model.int8 import quantize_blocks
from limner.model.kv import ReferenceKV
from limner.model.lora import Branches, Kronecker, LowRank
from limner.model.parallel import MODES, Parallel, divide
from limner.model.transformer import Transformer
from limner.tokens import image_ids, reference_ids, text_ids

GRIDS = [[], [(3, 5)], [(4, 4), (2, 7)], [(3, 3), (5, 2), (1, 4)]]
"""Of 0 to 3 references; 15 and 23 tokens do not divide by two."""
SIZES = [(2, (3, 7), 5), (1, (4, 4), 8), (3, (1, 2), 2)]
"""Batch, grid and text tokens."""


def inputs() -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(3)
    for number, (grids, (batch, grid, num_txt)) in enumerate(itertools.product(GRIDS, SIZES)):
        ref_ids = reference_ids(grids) if grids else torch.zeros(0, 4)
        yield (
            f"{len(grids)} references, size {number % len(SIZES)}",
            {
                "ref": torch.randn(1, len(ref_ids), 16, generator=generator),
                "ref_ids": ref_ids,
                "img": torch.randn(batch, grid[0] * grid[1], 16, generator=generator),
                "txt": torch.randn(batch, num_txt, 48, generator=generator),
                "img_ids": image_ids(grid),
                "txt_ids": text_ids(num_txt),
            },
        )


NAMES = [name for name, _ in inputs()]


def draw(transformer: Transformer, given: dict[str, Tensor]) -> tuple[Tensor, ReferenceKV | None]:
    references = transformer.prefill(given["ref"], given["ref_ids"]) if given["ref"].shape[1] else None
    ids = {"img_ids": given["img_ids"], "txt_ids": given["txt_ids"]}
    return transformer(given["img"], given["txt"], 0.61, references=references, **ids), references


def loras(transformer: Transformer) -> dict[str, list[tuple[LowRank, float]]]:
    """An update of every matrix that is cut, and of one that is not."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, module in transformer.named_modules():
        if ("transformer_blocks." in name and isinstance(module, torch.nn.Linear)) or name == "x_embedder":
            n, k = module.weight.shape
            down, up = torch.randn(3, k, generator=generator), torch.randn(n, 3, generator=generator)
            found[name] = [(LowRank(down=down * k**-0.5, up=up * 0.3), 0.7)]
    return found


def build(folder: Path) -> Transformer:
    config, weights = torch.load(folder / "weights.pt", weights_only=False)
    transformer = Transformer(config)
    transformer.load_state_dict(weights)
    return transformer


def work(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Everything that two processes are asked for here, at once: starting them takes longest."""
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (size,))
    for mode in MODES:
        transformer, parallel = build(folder), Parallel(mode, mesh)
        updates = loras(transformer)
        divide(transformer, parallel)
        assert (parallel.rank, parallel.size) == (rank, size)
        found[mode, "weights"] = sum(p.numel() for p in transformer.parameters())
        for name, given in inputs():
            found[mode, name] = draw(transformer, given)
        own = {
            name: [(parallel.own_update(name, update, transformer.config), strength) for update, strength in terms]
            for name, terms in updates.items()
        }
        branches = Branches(transformer, own, dtype=torch.float32)
        found[mode, "lora"] = draw(transformer, given)[0]
        branches.remove()
        int8 = build(folder)
        quantize_blocks(int8)
        divide(int8, parallel)
        found[mode, "int8"] = draw(int8, given)[0]
        with torch.enable_grad(), pytest.raises(InvalidRequest, match="records no gradients"):
            transformer(
                given["img"].clone().requires_grad_(),
                given["txt"],
                0.5,
                img_ids=given["img_ids"],
                txt_ids=given["txt_ids"],
            )
        if mode == "sequence":
            with pytest.raises(InvalidRequest, match="a stream of 1 tokens"):
                transformer(
                    given["img"], given["txt"][:, :1], 0.5, img_ids=given["img_ids"], txt_ids=given["txt_ids"][:1]
                )
        found[mode, "arithmetic"] = transformer.arithmetic
    kron = Kronecker(left=torch.ones(2, 2), right=torch.ones(16, 16), num_rows=32)
    with pytest.raises(InvalidRequest, match="LoKr"):
        Parallel("tensor", mesh).own_update("transformer_blocks.0.attn.to_q", kron, transformer.config)
    with pytest.raises(InvalidRequest, match="process 0 has 0, process 1 1"):
        parallel.check_same({"prompt": "a", "seed": rank})
    assert parallel.decided(f"I am {rank}") == "I am 0"
    assert parallel.of_first(torch.full((2,), float(rank))).tolist() == [0, 0]
    return found
