"""Blocks whose product and gate are one, against the same blocks where they are two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.native import has_tiles, without_tiles
from tests.support.tiny import make_transformer, relative_error
from torch import nn

from limner.config import TransformerConfig
from limner.model.arithmetic import Linear
from limner.model.int8 import Int8Linear, quantize_blocks
from limner.model.layers import FeedForward, ParallelAttention
from limner.model.lora import Branches, LowRank
from limner.model.rope import rope_table
from limner.model.transformer import Transformer
from limner.native import tiles
from limner.tokens import image_ids, reference_ids, text_ids

CPU = torch.device("cpu")
BOTH = ("transformer_blocks.0.ff.linear_in", "single_transformer_blocks.1.attn.to_qkv_mlp_proj")


def random_transformer() -> Transformer:
    theirs = make_transformer(64, double=1, single=2)
    ours = Transformer(TransformerConfig.from_diffusers(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False)


@pytest.fixture(params=["int8", "bfloat16"])
def network(request: pytest.FixtureRequest) -> Transformer:
    """In bfloat16, with matrices in it or in int8."""
    ours = random_transformer().to(torch.bfloat16)
    if request.param == "int8":
        quantize_blocks(ours)
    return ours


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of results that product and gate made together so far."""
    seen: list[tuple[int, ...]] = []
    original = tiles.product

    def product(*given: Any, **how: Any) -> torch.Tensor:
        found = original(*given, **how)
        if how.get("gated"):
            seen.append(tuple(found.shape))
        return found

    monkeypatch.setattr(tiles, "product", product)
    return seen


@torch.no_grad()
def velocity(model: Transformer) -> torch.Tensor:
    torch.manual_seed(5)
    img, txt, ref = (torch.randn(*shape).to(model.dtype) for shape in ((2, 35, 16), (2, 40, 48), (1, 44, 16)))
    kept = model.prefill(ref, reference_ids([(4, 6), (5, 4)]))
    found = model(img, txt, 0.7, img_ids=image_ids((5, 7)), txt_ids=text_ids(40), references=kept)
    return torch.cat(
        [found.flatten().float(), kept.layers[-1].k.flatten().float(), kept.layers[-1].v.flatten().float()]
    )


def unfused(network: nn.Module) -> list[Any]:
    """Have a hook on every matrix, which changes nothing."""
    return [m.register_forward_hook(lambda *_: None) for m in network.modules() if isinstance(m, (Int8Linear, Linear))]


@has_tiles
def test_a_velocity(network: Transformer, gated: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With references, in a batch; product and gate are one in every block, and nothing is packed."""
    together = velocity(network)
    mlp = network.config.mlp_width
    assert len(gated) == 1 + 1 + 2 + 2
    assert all(shape[1] == mlp for shape in gated)
    assert sorted(shape[0] for shape in gated) == [44, 44, 70, 70, 80, 150]  # references; text and image, both, image
    handles = unfused(network)
    gated.clear()
    apart = velocity(network)
    assert gated == []
    for handle in handles:
        handle.remove()
    assert torch.equal(velocity(network), together)
    without_tiles(monkeypatch)
    others = velocity(network)
    exact = random_transformer()
    exact.load_state_dict({name: tensor.float() for name, tensor in _wide(network).items()})
    expected = velocity(exact)
    errors = [relative_error(found, expected) for found in (together, apart, others)]
    assert 0 < relative_error(together, apart) < 0.02  # one rounding to bfloat16 less, and what int8 makes of it
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] <= 1.1 * errors[2]


def _wide(network: Transformer) -> dict[str, torch.Tensor]:
    """The state of the same network without int8."""
    found = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, Int8Linear):
            found[f"{name}.weight"] = module.weight * found.pop(f"{name}.weight_scale")[:, None]
    return found


@has_tiles
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_blocks_of_rows(batch: int, network: Transformer, gated: list[tuple[int, ...]]) -> None:
    """Each part of a block alone, where rounding of later ones hides nothing: the gate is that of the float formula."""
    block: Any = network.single_transformer_blocks[0]
    double: Any = network.transformer_blocks[0]
    attention, ff = block.attn, double.ff
    assert isinstance(attention, ParallelAttention)
    assert isinstance(ff, FeedForward)
    x = torch.randn(batch, 36, network.config.width).bfloat16()
    rope = rope_table(image_ids((6, 6)), axes=network.config.rope_axes, theta=network.config.rope_theta)
    for call in (
        lambda: ff(x),
        lambda: attention.merge(torch.ones(batch, 36, 2, 64).bfloat16(), attention.project(x, rope)[3]),
        lambda: attention.merge(torch.ones(batch, 36, 2, 64).bfloat16(), attention.project_q_mlp(x, rope)[1]),
    ):
        gated.clear()
        together = call()
        assert gated == [(batch * 36, network.config.mlp_width)]
        handles = unfused(network)
        apart = call()
        assert len(gated) == 1
        for handle in handles:
            handle.remove()
        assert together.shape == apart.shape
        assert relative_error(together, apart) < 0.02  # what is rounded once less is rounded to int8 after it
    both = attention.project(x, rope)[:3], attention.project_q_mlp(x, rope)[0]
    handles = unfused(network)
    again = attention.project(x, rope)[:3], attention.project_q_mlp(x, rope)[0]
    assert all(torch.equal(a, b) for a, b in zip((*both[0], both[1]), (*again[0], again[1]), strict=True))


@has_tiles
@torch.no_grad()
def test_the_formula() -> None:
    made = Int8Linear.of(Linear(128, 192).bfloat16())
    x = torch.randn(2, 7, 128).bfloat16()
    rows = made.prepare(x)
    assert not isinstance(rows, torch.Tensor)
    assert made.gates(rows)
    wide = ((rows.values.double() - 128) * rows.scale).view(2, 7, 128) @ (
        made.weight.double() * made.weight_scale[:, None]
    ).t()
    gate, value = wide.chunk(2, dim=-1)
    assert relative_error(made.gated(rows), F.silu(gate) * value) < 2.5e-3
    gate, value = wide[..., 24:152].chunk(2, dim=-1)
    place = torch.zeros(2, 7, 100).bfloat16()
    found = made.gated(rows, slice(24, 152), out=place[..., 30:94])
    assert relative_error(found, F.silu(gate) * value) < 2.5e-3
    assert place[..., :30].count_nonzero() == place[..., 94:].count_nonzero() == 0
    with pytest.raises(RuntimeError, match="view"):  # rows that are not at one distance
        made.gated(rows, slice(24, 152), out=torch.zeros(2, 9, 64).bfloat16()[:, :7])


@torch.no_grad()
def test_when_they_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Int8Linear.of(Linear(128, 192).bfloat16())
    x = torch.randn(7, 128)
    assert not made.gates(made.prepare(x))  # float32
    assert not made.gates(x.bfloat16())  # not prepared
    prepared = made.prepare(x.bfloat16())
    assert made.gates(prepared) == (tiles.why_missing() is None)
    assert not made.gates(prepared, slice(0, 96))  # halves of 48
    with torch.enable_grad():
        assert not made.gates(made.prepare(x.bfloat16().requires_grad_()))
    odd = Int8Linear.of(Linear(128, 168).bfloat16())  # no multiple of 32, so its products are oneDNN's, of a part too
    assert not odd.gates(odd.prepare(x.bfloat16()), slice(40, 168))
    without_tiles(monkeypatch)
    assert not made.gates(prepared)


@has_tiles
@torch.no_grad()
def test_the_formula_in_bfloat16() -> None:
    made = Linear(128, 192).bfloat16()
    x = torch.randn(2, 20, 128).bfloat16()
    assert made.gates(x)
    for rows, wide in ((None, made.weight), (slice(24, 152), made.weight[24:152])):
        gate, value = (x.double() @ wide.double().t()).chunk(2, dim=-1)
        place = torch.zeros(2, 20, 200).bfloat16()
        found = made.gated(x, rows, out=place[..., 30 : 30 + len(wide) // 2])
        assert relative_error(found, F.silu(gate) * value) < 2.5e-3
        assert torch.equal(made.gated(x, rows), found)
        assert place[..., :30].count_nonzero() == place[..., 30 + len(wide) // 2 :].count_nonzero() == 0
    assert relative_error(made(x[:, 3:19]), x[:, 3:19].double() @ made.weight.double().t()) < 2.5e-3
    for rows in (slice(32, 96), slice(37, 105), slice(150, None)):  # the bits of the whole, whatever the part
        assert torch.equal(made(x, rows), made(x)[..., rows])
    narrow = torch.randn(1, 128).bfloat16().expand(40, 128)
    assert torch.equal(made(narrow), made(narrow.contiguous()))
    apart = torch.randn(128, 40).bfloat16().t()
    assert torch.equal(made(apart), made(apart.contiguous()))


@torch.no_grad()
def test_when_they_are_two_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Linear(128, 192).bfloat16(), torch.randn(2, 20, 128).bfloat16()
    has = tiles.why_missing() is None
    assert made.gates(x) == has
    assert made.arithmetic_name(CPU).endswith(f" tiles {tiles.digest()}") == has
    assert not made.gates(x.float())
    assert not made.gates(x[:, :3])  # few rows: reading the weights takes longer than the products
    assert not made.gates(x, slice(0, 96))  # halves of 48
    assert not made.gates(x.to("meta"))
    with torch.enable_grad():
        assert not made.gates(x)
    made.arithmetic = torch.float32
    assert not made.gates(x)
    assert made.arithmetic_name(CPU) == "float32"
    made.arithmetic = torch.bfloat16
    assert made.gates(x) == has
    made.tiled = False
    assert not made.gates(x)
    assert made.arithmetic_name(CPU) == "bfloat16"
    assert torch.equal(made(x), F.linear(x.view(-1, 128), made.weight).view(2, 20, 192))
    made.tiled = True
    hook = made.register_forward_pre_hook(lambda *_: None)
    assert not made.gates(x)
    hook.remove()
    without_tiles(monkeypatch)
    assert not made.gates(x)


@has_tiles
@pytest.mark.parametrize("name", BOTH)
def test_a_lora_acts(name: str, network: Transformer, gated: list[tuple[int, ...]]) -> None:
    """It adds to the product, so its matrix makes product and gate apart; others go on as they were."""
    matrix: Any = network.get_submodule(name)
    update = LowRank(down=torch.randn(4, matrix.in_features), up=torch.randn(matrix.out_features, 4), scale=0.05)
    exact = random_transformer()
    exact.load_state_dict({key: tensor.float() for key, tensor in _wide(network).items()})
    before = velocity(exact)
    update.add_to(exact.get_submodule(name).weight, 1.0)
    expected = velocity(exact)
    alone, num = velocity(network), len(gated)
    branches = Branches(network, {name: [(update, 1.0)]}, dtype=torch.bfloat16, device=CPU)
    gated.clear()
    found = velocity(network)
    assert 0 < len(gated) < num
    assert relative_error(before, expected) > 0.2
    assert relative_error(found, expected) < 0.08
    branches.remove()
    assert torch.equal(velocity(network), alone)
