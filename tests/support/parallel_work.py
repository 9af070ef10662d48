"""What processes of one parallel model do in tests. Imports little: each process does that anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from limner.engine import EditRequest, Engine
from limner.errors import InvalidRequest
from limner.images import prepare_references
from limner.model.divide import Sharding, divide
from limner.model.int8 import quantize_blocks
from limner.model.kv import ReferenceKV
from limner.model.lora import Branches, Kronecker, LowRank, matrix_shapes
from limner.model.shards import MODES, RankGroup
from limner.model.transformer import Transformer
from limner.pipeline import Pipeline, PipelineOutput
from limner.ranks import own_device
from limner.references import References
from limner.store import ReferenceStore
from limner.tokens import image_ids, reference_ids, text_ids
from tests.support.tiny import picture

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
        transformer, ranks = build(folder), RankGroup(mode, mesh)
        updates = loras(transformer)
        divide(transformer, ranks)
        assert (ranks.rank, ranks.size) == (rank, size)
        found[mode, "weights"] = sum(p.numel() for p in transformer.parameters())
        for name, given in inputs():
            found[mode, name] = draw(transformer, given)
        sharding = Sharding(config=transformer.config, ranks=ranks)
        own = {
            name: [(sharding.part_of_update(name, update), strength) for update, strength in terms]
            for name, terms in updates.items()
        }
        branches = Branches(transformer, own, dtype=torch.float32, device=transformer.device)
        found[mode, "lora"] = draw(transformer, given)[0]
        branches.remove()
        int8 = build(folder)
        quantize_blocks(int8)
        divide(int8, ranks)
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
    tensor = Sharding(config=transformer.config, ranks=RankGroup("tensor", mesh))
    with pytest.raises(InvalidRequest, match="LoKr"):
        tensor.part_of_update("transformer_blocks.0.attn.to_q", kron)
    with pytest.raises(InvalidRequest, match="process 0 has 0, process 1 1"):
        ranks.check_same({"prompt": "a", "seed": rank})
    assert ranks.broadcast(f"I am {rank}") == "I am 0"
    assert ranks.broadcast_tensor(torch.full((2,), float(rank))).tolist() == [0, 0]
    return found


# whole pipelines


def pictures(number: int) -> list[Any]:
    return [picture(64 + 16 * i, 80, seed=i) for i in range(number)]


def edit(pipe: Pipeline, number: int, **how: Any) -> PipelineOutput:
    """Two prompts over so many references."""
    made = pipe(
        ["a hat", "two hats and a scarf"],
        image=pictures(number) or None,
        width=80,
        height=64,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
        max_sequence_length=40,
        num_inference_steps=2,
        **how,
    )
    assert isinstance(made, PipelineOutput)
    return made


def repaint(pipe: Pipeline, *, left: int = 16) -> PipelineOutput:
    """Two requests over two references: a mask with weights, and a crop of another canvas; they are drawn together."""
    mask = Image.new("L", (64, 80))
    mask.paste(255, (left, 16, 48, 64))
    canvas: dict[str, Any] = {"canvas": picture(64, 80, seed=8), "strength": 0.9}
    requests = [
        EditRequest(
            prompt="a hat",
            seeds=(4,),
            references=prepare_references(pictures(2), policy=pipe.reference_policy),
            num_inference_steps=2,
            control={"mask_image": mask, **more},  # type: ignore[typeddict-item]
        )
        for more in ({"reference_weights": [1.0, 0.5]}, canvas)
    ]
    return pipe.draw(requests, output_type="latent")


def lora(transformer: Transformer) -> dict[str, Tensor]:
    """Tensors of an adapter, by names of diffusers."""
    generator = torch.Generator().manual_seed(6)
    found = {}
    for name in ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_out"):
        n, k = matrix_shapes(transformer)[name]
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(2, k, generator=generator) * k**-0.5
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(n, 2, generator=generator)
    return found


def pipelines(rank: int, size: int, model: Path, folder: Path, adapter: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in MODES:
        store = folder / f"store-{mode}"

        def load(mode: str = mode, store: Path = store, **options: Any) -> Pipeline:
            return Pipeline.from_pretrained(model, parallel=mode, store=ReferenceStore(disk_path=store), **options)

        pipe = load()
        for number in range(4):
            for state in ("cold", "warm"):
                made = edit(pipe, number)
                found[mode, number, state] = made.images, made.reference_cache
        found[mode, "digest"], found[mode, "arithmetic"] = pipe.digest, pipe.kernel

        refs = pipe.prefill(pictures(2))
        found[mode, "key"], found[mode, "shard"], found[mode, "nbytes"] = refs.key, refs.shard, refs.nbytes
        refs.save(folder / f"{mode}-{rank}.safetensors")
        dist.barrier()

        # one process alone has lost its entry, or has a damaged file: neither waits for the other
        if rank == 1:
            assert pipe.store.remove(refs.key)
        dist.barrier()
        found[mode, "lost"] = edit(pipe, 2).reference_cache, edit(pipe, 2).reference_cache
        pipe.store.put(refs)
        pipe.store.flush()
        dist.barrier()
        found[mode, "next process"] = edit(load(), 2).reference_cache
        dist.barrier()
        file = pipe.store.file(refs.key)
        assert file is not None
        dist.barrier()
        if rank == 1:
            file.write_bytes(file.read_bytes()[:-64])
        dist.barrier()
        made = edit(load(), 2)
        found[mode, "damaged"] = made.images, made.reference_cache

        # packs: a whole one is cut, a part of another process is refused
        whole = References.load(folder / "whole.safetensors")
        made = pipe(
            "a hat",
            references=whole,
            width=64,
            height=64,
            output_type="latent",
            max_sequence_length=40,
            generator=torch.Generator().manual_seed(1),
            num_inference_steps=1,
        )
        found[mode, "whole pack"] = made.images
        if mode == "tensor":
            with pytest.raises(InvalidRequest, match=rf"part \({1 - rank}, 2\) .* this pipeline has \({rank}, 2\)"):
                pipe("a hat", references=References.load(folder / f"tensor-{1 - rank}.safetensors"))
            with pytest.raises(InvalidRequest, match="cannot be cut into 2 parts"):
                refs.part(0, 2)

        # what processes are asked for has to be equal; what is drawn is
        with pytest.raises(InvalidRequest, match="prompt: process 0 has .* process 1 "):
            pipe(f"hat {rank}", width=64, height=64, max_sequence_length=40)
        with pytest.raises(InvalidRequest, match="generator: process 0 has "):
            pipe("a", width=64, height=64, max_sequence_length=40, generator=torch.Generator().manual_seed(rank))
        found[mode, "repainted"] = repaint(pipe).images
        with pytest.raises(InvalidRequest, match="mask_image: process 0 has "):
            repaint(pipe, left=16 * rank)
        with pytest.raises(InvalidRequest, match="image: process 0 has "):
            pipe.prefill(picture(64, 64, seed=rank))
        made = pipe("a hat", width=64, height=64, output_type="latent", max_sequence_length=40, num_inference_steps=1)
        found[mode, "drawn"] = made.seeds, made.images
        pipe.load_lora_weights(adapter)
        found[mode, "lora"] = edit(pipe, 1).images
        pipe.set_adapters("default_0", 1 - rank / 2)
        with pytest.raises(InvalidRequest, match="lora: process 0 has "):
            edit(pipe, 1)
        pipe.set_adapters("default_0")
        pipe.fuse_lora()
        found[mode, "fused"] = edit(pipe, 1).images

        with pytest.raises(InvalidRequest, match="stays where it was loaded"):
            pipe.to(torch.bfloat16)
        with pytest.raises(InvalidRequest, match="an engine is in one"):
            Engine(pipe)
        with pytest.raises(InvalidRequest, match="memory_limit: is for a model in one process"):
            load(memory_limit="1GiB")
        wide = load(torch_dtype=torch.bfloat16)  # cast: what is not kept has to go
        found[mode, "cast"] = [(x.untyped_storage().nbytes(), x.nbytes) for x in wide.transformer.state_dict().values()]
        narrow = load(torch_dtype=torch.bfloat16, quantize="int8", kv_cache_dtype="int8")
        made = edit(narrow, 1)
        found[mode, "int8"] = made.images, narrow.prefill(pictures(1)).nbytes, narrow.digest
        found[mode, "cast"] += [
            (x.untyped_storage().nbytes(), x.nbytes) for x in narrow.transformer.state_dict().values()
        ]
        joint = Pipeline.from_pretrained(model, parallel=mode, references="joint", store=ReferenceStore())
        found[mode, "joint"] = edit(joint, 2).images, joint.prefill(pictures(2)).shard
        if mode == "tensor":
            found[mode, "reuse"] = edit(joint, 2, reuse="step0").images
        else:
            with pytest.raises(InvalidRequest, match="reuse: is not offered for a model divided by sequence"):
                edit(joint, 2, reuse="step0")
    with pytest.raises(InvalidRequest, match="'data' is not one of None, 'tensor', 'sequence'"):
        load("data")
    with pytest.raises(InvalidRequest, match="mps cannot be that of each process"):
        own_device(torch.device("mps"))
    return found
