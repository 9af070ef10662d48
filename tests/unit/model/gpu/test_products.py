"""Products of int8 weights as a GPU computes them: torch's operators run on a CPU too, and the formulas are those there."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import make_transformer, relative_error

import limner.model.int8 as int8
from limner.config import TransformerConfig
from limner.model.arithmetic import Linear
from limner.model.gpu import choice, products
from limner.model.int8 import Int8Linear, quantize_blocks, quantize_rows, settle_products
from limner.model.lora import Branches, LowRank
from limner.model.transformer import Transformer
from limner.tokens import image_ids, reference_ids, text_ids

HERE = torch.device("cpu"), torch.bfloat16


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 and fp8 run as they would there: oneDNN's products are not asked."""
    monkeypatch.setattr(int8, "has_int8_products", lambda: False)
    monkeypatch.setattr(products, "right_products", lambda device, dtype: ("fp8", "int8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_as_on_a_cpu(dtype: torch.dtype) -> None:
    x = (torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    x[0], x[1, 5] = 0, 1000
    values, scale = products.quantize(x, torch.int8)
    on_cpu = quantize_rows(x)
    assert torch.equal(values.int(), on_cpu.values.int() - 128)
    assert torch.equal(scale, on_cpu.scale)


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_int8_product_is_exact_up_to_its_scales(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_AT_ONCE", 40 * 24)  # some rows at a time
    values, scale = products.quantize(torch.randn(rows, 64), torch.int8)
    weight, weight_scale = torch.randint(-127, 128, (24, 64), dtype=torch.int8), torch.rand(24)
    whole = values.long() @ weight.long().t()
    expected = whole.double() * scale.double() * weight_scale.double()
    for dtype, limit in ((torch.float32, 1e-7), (torch.bfloat16, 3e-3)):
        found = products.int8_product(values, scale, weight, weight_scale, dtype=dtype)
        assert found.dtype == dtype
        assert relative_error(found, expected) <= limit


def test_fp8_product_is_that_of_its_operands() -> None:
    values, scale = products.quantize(torch.randn(20, 64), products.FP8)
    linear = Int8Linear.of(Linear(64, 48))
    weight, weight_scale = products.fp8_weight(linear.weight, linear.weight_scale)
    wide, narrow = linear.weight.float() * linear.weight_scale[:, None], weight.float() * weight_scale[:, None]
    assert 5e-3 < relative_error(narrow, wide) < 4e-2  # three bits behind the point
    expected = (values.double() * scale) @ narrow.double().t()
    found = products.fp8_product(values, scale, weight, weight_scale, dtype=torch.bfloat16)
    assert relative_error(found, expected) <= 3e-3


def test_fits() -> None:
    for shape, fp8, found in (((24, 64), False, True), ((24, 64), True, False), ((20, 64), False, False)):
        weight = torch.empty(shape, dtype=products.FP8 if fp8 else torch.int8)
        assert products.fits(weight) is found
    assert not products.fits(torch.empty(0, 64, dtype=torch.int8))


def test_a_device_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates run on their operands; the slower and coarser one is not taken."""
    measured: list[str] = []
    monkeypatch.setattr(products, "_right", {})
    monkeypatch.setattr(products, "products_candidates", lambda device, dtype: ["int8", "fp8"])
    monkeypatch.setattr(products, "seconds", lambda device, call: measured.append("one") or 1.0)
    assert products.choose_products(*HERE) == products.choose_products(*HERE) == "int8"
    assert products.right_products(*HERE) == ("int8", "fp8")
    assert len(measured) == 2
    assert choice.MARGIN > 1


def test_what_rounds_wrongly_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one pass that rounds activations is tried with the product. Weights in a format that is wrong are widened."""
    quantize = products.quantize_plain

    def twice_in_int8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        values, scale = quantize(x, dtype)
        return values, 2 * scale if dtype == torch.int8 else scale

    monkeypatch.setattr(products, "_right", {})
    monkeypatch.setattr(products, "products_candidates", lambda device, dtype: ["int8", "fp8"])
    monkeypatch.setattr(products, "quantize", twice_in_int8)
    monkeypatch.setattr(int8, "has_int8_products", lambda: False)
    assert products.right_products(*HERE) == ("fp8",)
    made = Int8Linear.of(Linear(64, 48))  # not rounded to fp8, as under a memory limit
    assert made.arithmetic_name(torch.bfloat16) == "int8 widened"
    x = torch.randn(3, 64).bfloat16()
    assert relative_error(made(x), x.float() @ made.weight.float().t() * made.weight_scale) < 1e-2
    made.to_fp8()
    assert made.arithmetic_name(torch.bfloat16) == "fp8 products"


def test_a_cast_leaves_narrow_weights_as_they_are() -> None:
    for fp8 in (False, True):
        made = Int8Linear.of(Linear(64, 48))
        if fp8:
            made.to_fp8()
        before = {name: x.clone() for name, x in made.state_dict().items()}
        made.to(torch.float16)
        for name, x in made.state_dict().items():
            assert x.dtype == before[name].dtype
            assert torch.equal(x.float(), before[name].float())


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True], ids=["int8", "fp8"])
def test_a_matrix(dtype: torch.dtype, fp8: bool) -> None:
    linear = Linear(256, 192).to(dtype)
    made, x = Int8Linear.of(linear), torch.randn(2, 33, 256).to(dtype)
    assert made.arithmetic_name(dtype) == "int8 products"
    if fp8:
        made.to_fp8()
        assert made.arithmetic_name(dtype) == "fp8 products"
    expected = x.float() @ linear.weight.float().t()
    assert 1e-3 < relative_error(made(x), expected) < (5e-2 if fp8 else 1.5e-2)
    assert (made(x).dtype, made(x).shape) == (dtype, (2, 33, 192))
    assert torch.equal(made(made.prepare(x)), made(x))
    assert torch.equal(made(x, slice(64, 192)), made(x)[..., 64:192])
    with torch.enable_grad():
        gradient = torch.autograd.grad(made(x.requires_grad_()).float().sum(), x)[
            0
        ]  # widened: rounding has no gradient
    assert relative_error(gradient[0, 0], linear.weight.float().sum(0)) < 5e-2


@pytest.mark.skipif(not int8.has_int8_products(), reason="this CPU has no int8 dot products")
def test_an_int8_product_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Int8Linear.of(Linear(256, 192)), torch.randn(40, 256)
    on_cpu = made(x)
    monkeypatch.setattr(int8, "has_int8_products", lambda: False)
    monkeypatch.setattr(products, "right_products", lambda device, dtype: ("int8",))
    assert relative_error(made(x), on_cpu) <= 1e-6


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("fp8", [False, True], ids=["int8", "fp8"])
@torch.no_grad()
def test_a_lora_acts_beside_narrow_weights(fp8: bool) -> None:
    linear = Linear(64, 48)
    network = torch.nn.ModuleDict({"one": Int8Linear.of(linear)})
    if fp8:
        network["one"].to_fp8()
    x, update = torch.randn(3, 20, 64), LowRank(down=torch.randn(4, 64), up=torch.randn(48, 4), scale=0.5)
    plain = network["one"](x)
    branches = Branches(network, {"one": [(update, 1.0)]}, dtype=torch.float32, device=torch.device("cpu"))
    added = 0.5 * x @ update.down.t() @ update.up.t()
    assert relative_error(network["one"](x) - plain, added) <= 1e-5
    prepared = network["one"].prepare(x)
    assert relative_error(network["one"](prepared, slice(8, 24)), (plain + added)[..., 8:24]) <= 1e-5
    branches.remove()
    assert torch.equal(network["one"](x), plain)


@pytest.mark.usefixtures("as_on_a_card")
@torch.no_grad()
def test_a_whole_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = make_transformer(64, double=1, single=2)
    exact = Transformer(TransformerConfig.from_diffusers(theirs.config))
    exact.load_state_dict(theirs.state_dict())
    img, txt, ref = torch.randn(2, 35, 16), torch.randn(2, 40, 48), torch.randn(1, 44, 16)
    places = {"img_ids": image_ids((5, 7)), "txt_ids": text_ids(40)}
    ref_ids = reference_ids([(4, 6), (5, 4)])

    def velocity(model: Transformer) -> torch.Tensor:
        return model(img, txt, 0.7, **places, references=model.prefill(ref, ref_ids))

    expected, errors = velocity(exact), []
    for fp8 in (False, True):
        made = Transformer(exact.config)
        made.load_state_dict(theirs.state_dict())
        quantize_blocks(made)
        settle_products(made, torch.float32)  # a CPU: nothing changes
        for module in made.modules():
            if isinstance(module, Int8Linear):
                assert module.weight.dtype == torch.int8
                if fp8:
                    module.to_fp8()
        assert made.arithmetic.endswith("/fp8 products" if fp8 else "/int8 products")
        errors.append(relative_error(velocity(made), expected))
    assert 0 < errors[0] < 6e-2
    assert errors[0] < errors[1] < 0.2
