"""Matrix products in a wider dtype than the weights'."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import make_transformer, relative_error

from limner.config import TransformerConfig
from limner.model import arithmetic
from limner.model.arithmetic import Linear, fast_dtype
from limner.model.transformer import Transformer
from limner.tokens import image_ids, reference_ids, text_ids

CPU = torch.device("cpu")


def test_choice() -> None:
    assert fast_dtype(CPU, torch.float32) == torch.float32
    assert fast_dtype(CPU, torch.bfloat16) in (torch.float32, torch.bfloat16)
    assert fast_dtype(CPU, torch.bfloat16) == fast_dtype(CPU, torch.bfloat16)
    assert fast_dtype(torch.device("meta"), torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("block", [48, 100, 1 << 22])
def test_widened_products_are_rounded_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_BLOCK", block)
    linear = Linear(48, 70).bfloat16()
    linear.arithmetic = torch.float32
    x = torch.randn(2, 33, 48).bfloat16()
    with torch.no_grad():
        found, part = linear(x), linear(x, slice(5, 31))
        exact = x.double() @ linear.weight.double().T
        few = linear(x[:1, :4])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.float().bfloat16()) or relative_error(found, exact) < 2.0**-9
    torch.testing.assert_close(part, found[..., 5:31], atol=0.02, rtol=0.01)  # other blocks, other order of sums
    assert relative_error(few, exact[:1, :4]) < 2.0**-7


@torch.no_grad()
def test_both_arithmetics_agree_with_diffusers_in_bfloat16() -> None:
    """To the rounding of bfloat16 (8 bits, relative 4e-3) through 5 blocks; float32 products are the nearer ones."""
    theirs = make_transformer(32).bfloat16()
    ours = Transformer(TransformerConfig.from_diffusers(theirs.config)).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    exact = Transformer(ours.config)
    exact.load_state_dict({name: value.float() for name, value in theirs.state_dict().items()})
    img, txt, ref = (torch.randn(1, n, c).bfloat16() for n, c in ((35, 16), (40, 48), (44, 16)))
    ids, txt_ids, ref_ids = image_ids((5, 7)), text_ids(40), reference_ids([(4, 6), (5, 4)])
    sigma = torch.tensor([0.5])
    joined = torch.cat([ref_ids, ids])
    expected = theirs(
        torch.cat([ref, img], 1),
        txt,
        sigma.bfloat16(),
        joined,
        txt_ids,
        kv_cache_mode="extract",
        num_ref_tokens=44,
        return_dict=False,
    )[0]
    kv = exact.prefill(ref.float(), ref_ids)
    truth = exact(img.float(), txt.float(), sigma, img_ids=ids, txt_ids=txt_ids, references=kv)
    errors = {}
    for kernel, dtype in (("chunked", torch.bfloat16), ("chunked_float32", torch.float32)):
        ours.kernel = kernel
        ours.use_arithmetic(dtype)
        references = ours.prefill(ref, ref_ids)
        assert references.layers[0].k.dtype == torch.bfloat16
        found = ours(img, txt, sigma, img_ids=ids, txt_ids=txt_ids, references=references)
        assert relative_error(found, expected) < 0.05
        errors[kernel] = relative_error(found, truth)
        assert ours.arithmetic.startswith(f"cpu/{kernel}/{str(dtype).removeprefix('torch.')}")
    assert errors["chunked_float32"] <= relative_error(expected, truth) * 1.2
