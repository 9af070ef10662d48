"""A process alone gets its arguments back; several divide matrices and tokens without loss."""

from __future__ import annotations

import pytest
import torch

from limner.errors import InvalidRequest, RemoteError
from limner.model.rope import rope_table
from limner.model.shards import MatrixShard, RankGroup, Ranks, SlicedTokens, check_mode, check_no_gradient, peer_errors


def group(rank: int, size: int, mode: str = "sequence") -> RankGroup:
    """A place in a group that cannot be talked to."""
    ranks = RankGroup.__new__(RankGroup)
    ranks.mode, ranks.rank, ranks.size = mode, rank, size
    return ranks


def test_a_process_alone_gets_its_arguments_back() -> None:
    ranks, x, y = Ranks.single(), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert ranks.alone
    assert (ranks.rank, ranks.size, ranks.shard, ranks.arithmetic) == (0, 1, None, ())
    assert ranks.all_gather("a") == ["a"]
    assert ranks.broadcast("a") == "a"
    assert ranks.broadcast_tensor(x) is x
    ranks.check_same({"prompt": "a"})
    slices = ranks.token_slices(3, 0)
    rope = rope_table(torch.zeros(3, 4), axes=(4,) * 4, theta=10.0)
    assert slices.own(x, 0) is x
    assert slices.whole(x, 1) is x
    assert slices.rope(rope) is rope
    k, v = slices.gather(x, y)
    assert k is x
    assert v is y


def test_what_a_mode_divides() -> None:
    tensor, sequence = group(1, 3, "tensor"), group(1, 3)
    assert (tensor.shard, sequence.shard) == ((1, 3), None)
    assert tensor.arithmetic == ("tensor parallel 3",)
    assert not isinstance(tensor.token_slices(3), SlicedTokens)
    assert isinstance(sequence.token_slices(3), SlicedTokens)
    assert not tensor.alone
    with pytest.raises(InvalidRequest, match="'data' is not one of None, 'tensor', 'sequence'"):
        check_mode("data")


@pytest.mark.parametrize("lengths", [(5, 23), (7,), (3, 3)])
def test_slices_are_the_whole_streams(lengths: tuple[int, ...]) -> None:
    streams = [torch.randn(2, length, 4) for length in lengths]
    rope = rope_table(torch.arange(sum(lengths))[:, None].expand(-1, 4), axes=(4,) * 4, theta=10.0)
    of_rank = [SlicedTokens(group(rank, 3), lengths) for rank in range(3)]
    starts = [0]
    for number, stream in enumerate(streams):
        pieces = [slices.own(stream, number) for slices in of_rank]
        assert torch.equal(torch.cat(pieces, dim=1), stream)
        assert max(p.shape[1] for p in pieces) - min(p.shape[1] for p in pieces) <= 1
        starts.append(starts[-1] + stream.shape[1])
    tables = [slices.rope(rope) for slices in of_rank]
    for number, start in enumerate(starts[:-1]):
        parts = []
        for slices, table in zip(of_rank, tables, strict=True):
            own = [slices.own(stream, i).shape[1] for i, stream in enumerate(streams)]
            first = sum(own[:number])
            parts.append(table.cos_SP[first : first + own[number]])
        assert torch.equal(torch.cat(parts), rope.cos_SP[start : starts[number + 1]])


def test_a_stream_has_a_token_for_each_process() -> None:
    with pytest.raises(InvalidRequest, match=r"a stream of 2 tokens \(all: 2, 9\) cannot be divided among 3 processes"):
        group(0, 3).token_slices(2, 9)


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_of_a_matrix_are_divided_each_by_itself(dim: int) -> None:
    x = torch.arange(12.0).reshape(12, 1) if dim == 0 else torch.arange(12.0).reshape(1, 12)
    shard = MatrixShard(dim=dim, blocks=(4, 8))
    assert shard.part(x, rank=0, size=2).flatten().tolist() == [0, 1, 4, 5, 6, 7]
    assert shard.part(x, rank=1, size=2).flatten().tolist() == [2, 3, 8, 9, 10, 11]
    rows = MatrixShard(dim=0, blocks=(12,)).part(torch.zeros(12, 3), rank=1, size=2)
    assert rows.storage_offset() == 18  # a view: mapped weights stay mapped


def test_errors_of_peers_and_gradients() -> None:
    with pytest.raises(RemoteError, match=r"ended or cannot be reached \(connection reset\)"), peer_errors():
        raise RuntimeError("connection reset\nand more")
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(InvalidRequest, match="records no gradients"):
        check_no_gradient(x)
    with torch.no_grad():
        check_no_gradient(x)
