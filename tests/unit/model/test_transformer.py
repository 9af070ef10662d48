"""How a transformer runs is one value, changed by `use`; blocks run in order, each while its weights are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from tests.support.tiny import make_transformer
from torch import nn

from limner import InvalidRequest
from limner.config import TransformerConfig
from limner.model.context import Execution
from limner.model.kv import LayerKV, ReferenceKV
from limner.model.lora import Branches, Dense
from limner.model.shards import Ranks
from limner.model.transformer import Transformer
from limner.tokens import image_ids, reference_ids, text_ids


@pytest.fixture
def transformer() -> Transformer:
    theirs = make_transformer(16, double=2, single=2)
    ours = Transformer(TransformerConfig.from_diffusers(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False)


class Watching:
    """A staging that writes down which blocks run, and takes one away before the next."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []
        self.present = 0

    def visit(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        for layer in layers:
            self.present += 1
            assert self.present == 1
            self.seen.append(layer)
            yield layer
            self.present -= 1


def test_use_changes_what_is_named_and_nothing_else(transformer: Transformer) -> None:
    first, watching = transformer.execution, Watching()
    assert first.kernel is None
    assert first.ranks.alone
    transformer.use(staging=watching)
    transformer.kernel = "dense"
    assert transformer.execution.staging is watching
    assert (transformer.kernel, transformer.execution.kernel) == ("dense", "dense")
    transformer.use(kernel=None, ranks=Ranks.single())
    assert transformer.kernel is None
    assert transformer.execution.staging is watching
    assert first == Execution(staging=first.staging, ranks=first.ranks)  # a value: it did not change


def test_adapters_are_attached_to_a_network(transformer: Transformer) -> None:
    assert transformer.attached is None
    adapters = object()
    transformer.attach(adapters)
    assert transformer.attached is adapters
    assert set(transformer.state_dict()) == set(make_transformer(16, double=2, single=2).state_dict())


def test_blocks_run_in_order_each_while_it_is_staged(transformer: Transformer) -> None:
    given = torch.randn(1, 4, 16), torch.randn(1, 3, 48), 0.5
    ids = {"img_ids": image_ids((2, 2)), "txt_ids": text_ids(3)}
    ref = torch.randn(1, 6, 16), reference_ids([(2, 3)])
    plain_kv = transformer.prefill(*ref)
    plain = transformer(*given, references=plain_kv, **ids)
    transformer.use(staging=(watching := Watching()))
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    kv = transformer.prefill(*ref)
    assert [id(block) for block in watching.seen] == [id(block) for block in blocks]
    assert torch.equal(transformer(*given, references=kv, **ids), plain)
    assert [id(block) for block in watching.seen] == 2 * [id(block) for block in blocks]
    assert watching.present == 0


def test_references_of_another_depth_are_refused(transformer: Transformer) -> None:
    layer = LayerKV(*(torch.zeros(1, 2, 2, 16) for _ in range(2)))
    with pytest.raises(ValueError, match="references have 1 layers of K/V, the model 4"):
        transformer(
            torch.zeros(1, 4, 16),
            torch.zeros(1, 3, 48),
            0.5,
            img_ids=image_ids((2, 2)),
            txt_ids=text_ids(3),
            references=ReferenceKV(layers=(layer,)),
        )


@torch.no_grad()
def test_compiled_blocks_are_one_graph_each_and_follow_loras(transformer: Transformer) -> None:
    """Nothing on the way measures or logs, and a hook that comes later is not left out."""
    config = transformer.config
    given = [torch.randn(1, 16, config.in_channels), torch.randn(1, 8, config.text_width), torch.tensor(0.5)]
    places = {"img_ids": image_ids((4, 4)), "txt_ids": text_ids(8)}
    kv = transformer.prefill(torch.randn(1, 4, config.in_channels), reference_ids([(2, 2)]))

    def call() -> torch.Tensor:
        velocity: torch.Tensor = transformer(*given, references=kv, **places)
        return velocity

    plain = call()
    transformer.compile_blocks("eager")  # one graph each, or an error
    torch.testing.assert_close(call(), plain, rtol=1e-5, atol=1e-5)
    updates = {"transformer_blocks.0.ff.linear_in": torch.randn(6 * config.width, config.width)}
    names = {name: [(Dense(weight=x), 1.0)] for name, x in updates.items()}
    branches = Branches(transformer, names, dtype=torch.float32, device=transformer.device)
    changed = call()
    transformer.compile_blocks(None)
    torch.testing.assert_close(call(), changed, rtol=1e-5, atol=1e-5)
    assert (changed - plain).norm() > 0.01 * plain.norm()
    branches.remove()
    assert torch.equal(call(), plain)
    with pytest.raises(InvalidRequest, match="compile_blocks: on a CPU is for torch.float32"):
        transformer.bfloat16().compile_blocks("eager")
