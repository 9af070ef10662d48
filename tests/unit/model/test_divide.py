"""Parts of all processes are the whole matrix; a process alone has it whole. Two processes at work: numerics/."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.native import has_tiles
from tests.support.tiny import make_transformer

from limner.config import TransformerConfig
from limner.errors import InvalidRequest
from limner.model.arithmetic import Linear
from limner.model.divide import Sharding, agree_on_arithmetic, divide
from limner.model.lora import Kronecker, LowRank
from limner.model.shards import RankGroup, Ranks
from limner.model.transformer import Transformer
from limner.native import tiles

ROWS, COLUMNS = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    theirs = make_transformer(16, double=1, single=1)
    ours = Transformer(TransformerConfig.from_diffusers(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    return ours


def sharding(config: TransformerConfig, rank: int, size: int = 2) -> Sharding:
    ranks = RankGroup.__new__(RankGroup)
    ranks.mode, ranks.rank, ranks.size = "tensor", rank, size
    return Sharding(config=config, ranks=ranks)


class Other(Ranks):
    """Two processes, of which the other one answers what this one does, but for one text."""

    mode, size = "sequence", 2

    def __init__(self, changed: tuple[str, str] = ("", "")) -> None:
        self._changed = changed

    def all_gather(self, value: Any) -> list[Any]:
        return [value, value.replace(*self._changed) if isinstance(value, str) else value]


def test_processes_that_multiply_differently_are_refused() -> None:
    """Parts of K/V of both would be kept under one name."""
    transformer = Transformer(TransformerConfig.from_diffusers(make_transformer(16, double=1, single=1).config))
    agree_on_arithmetic(transformer, Other())
    with pytest.raises(InvalidRequest, match=r"parallel: processes multiply differently \(.*float16.*; .*float32.*\)"):
        agree_on_arithmetic(transformer, Other(("float32", "float16")))


@has_tiles
def test_a_process_without_tiles_has_all_use_those_of_torch() -> None:
    """Of products in bfloat16: the same picture everywhere, without being asked."""
    transformer = Transformer(
        TransformerConfig.from_diffusers(make_transformer(16, double=1, single=1).config)
    ).bfloat16()
    ours = f" tiles {tiles.digest()}"
    assert ours in transformer.arithmetic
    agree_on_arithmetic(transformer, Other())
    assert ours in transformer.arithmetic
    agree_on_arithmetic(transformer, Other((ours, "")))
    assert "/bfloat16/" in transformer.arithmetic
    assert not any(matrix.tiled for matrix in transformer.modules() if isinstance(matrix, Linear))


def test_a_process_alone_has_all_of_it(transformer: Transformer) -> None:
    alone = Sharding(config=transformer.config, ranks=Ranks.single())
    before = transformer.state_dict()
    divide(transformer, Ranks.single())
    agree_on_arithmetic(transformer, Ranks.single())
    assert transformer.kernel is None
    for name, value in transformer.state_dict().items():
        assert value.data_ptr() == before[name].data_ptr()
        assert alone.part(name, value) is value
    update = LowRank(down=torch.zeros(1, 32), up=torch.zeros(32, 1))
    assert alone.part_of_update(ROWS, update) is update
    assert alone.whole_shape(ROWS, (32, 32)) == (32, 32)
    assert alone.of(ROWS) is None


def test_parts_of_a_matrix_are_the_whole(transformer: Transformer) -> None:
    weights = transformer.state_dict()
    divided = 0
    for name, whole in weights.items():
        parts = [sharding(transformer.config, rank).part(name, whole) for rank in range(2)]
        shard = sharding(transformer.config, 0).of(name.rpartition(".")[0])
        if shard is None:
            assert parts[0] is whole
            continue
        divided += 1
        blocks = [torch.split(part, [b // 2 for b in shard.blocks], shard.dim) for part in parts]
        joined = torch.cat([half for both in zip(*blocks, strict=True) for half in both], shard.dim)
        assert torch.equal(joined, whole)
        shape = sharding(transformer.config, 0).whole_shape(name.removesuffix(".weight"), tuple(parts[0].shape))
        assert shape == whole.shape
    assert divided == 12 + 2


@pytest.mark.parametrize("name", [ROWS, COLUMNS])
def test_a_part_of_an_update_is_the_update_of_the_part(name: str, transformer: Transformer) -> None:
    whole = transformer.state_dict()[f"{name}.weight"]
    update = LowRank(down=torch.randn(2, whole.shape[1]), up=torch.randn(whole.shape[0], 2), scale=0.5)
    for rank in range(2):
        own = sharding(transformer.config, rank)
        part = own.part_of_update(name, update)
        assert isinstance(part, LowRank)
        expected = own.part(f"{name}.weight", 0.5 * update.up @ update.down)
        torch.testing.assert_close(0.5 * part.up @ part.down, expected)


def test_what_cannot_be_divided(transformer: Transformer) -> None:
    with pytest.raises(InvalidRequest, match="num_heads=2 cannot be divided by 3 processes; allowed for tensor: 1, 2;"):
        sharding(transformer.config, 0, size=3).check()
    kron = Kronecker(left=torch.ones(2, 2), right=torch.ones(16, 16), num_rows=32)
    with pytest.raises(InvalidRequest, match="LoKr"):
        sharding(transformer.config, 0).part_of_update(ROWS, kron)
