"""Every dialect of the table with every kind of update, against products of the matrices by hand; and the docs' table."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.lora_files import OTHERS, SHAPES, dense, split, write
from torch import Tensor

from limner import CheckpointError
from limner.cli import main
from limner.weights.lora import load_lora
from limner.weights.lora.dialects import DIALECTS, Dialect

DOCS = Path(__file__).parents[4] / "docs"
Made = tuple[dict[str, Tensor], Tensor]


def lora(module: str, shape: tuple[int, int], names: tuple[str, str] = ("lora_A", "lora_B")) -> Made:
    down, up = torch.randn(3, shape[1]), torch.randn(shape[0], 3)
    tensors = {f"{module}.{names[0]}.weight": down, f"{module}.{names[1]}.weight": up}
    return tensors | {f"{module}.alpha": torch.tensor(2.0)}, 2 / 3 * (up.double() @ down.double())


def lokr(module: str, shape: tuple[int, int], *, both: bool = False) -> Made:
    """With an alpha of half precision that is infinite, unless a factor has a rank."""
    left, right = torch.randn(4, 4), torch.randn(shape[0] // 4, shape[1] // 4)
    tensors = {f"{module}.lokr_w1": left, f"{module}.alpha": torch.tensor(9999999999).half()}
    if both:
        a, b = torch.randn(shape[0] // 4, 2), torch.randn(2, shape[1] // 4)
        tensors |= {f"{module}.lokr_w2_a": a, f"{module}.lokr_w2_b": b, f"{module}.alpha": torch.tensor(3.0)}
        right = 1.5 * a @ b
    else:
        tensors[f"{module}.lokr_w2"] = right
    return tensors, torch.kron(left.double(), right.double())


def loha(module: str, shape: tuple[int, int]) -> Made:
    parts = {
        f"hada_w{i}_{s}": torch.randn(*((shape[0], 2) if s == "a" else (2, shape[1]))) for i in (1, 2) for s in "ab"
    }
    one, two = (parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2))
    tensors = {f"{module}.{part}": value for part, value in parts.items()}
    return tensors | {f"{module}.alpha": torch.tensor(1.0)}, 0.5 * one * two


def difference(module: str, shape: tuple[int, int]) -> Made:
    value = torch.randn(shape)
    return {f"{module}.diff": value}, value.double()


KINDS: dict[str, Callable[[str, tuple[int, int]], Made]] = {
    "LoRA": lora,
    "LoRA down and up": lambda module, shape: lora(module, shape, ("lora_down", "lora_up")),
    "LoRA of diffusers once": lambda module, shape: lora(module, shape, ("lora.down", "lora.up")),
    "LoRA with an adapter's name": lambda module, shape: lora(module, shape, ("lora_A.default", "lora_B.default")),
    "LoKr": lokr,
    "LoKr with a rank": lambda module, shape: lokr(module, shape, both=True),
    "LoHa": loha,
    "difference": difference,
}


def written(dialect: Dialect, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of an update of every matrix in a dialect, and what they add by the names of diffusers."""
    torch.manual_seed(0)
    originals = SHAPES | OTHERS
    if dialect.layout == "original":
        shapes = originals
    else:
        shapes = {name: tuple(v.shape) for name, v in split({n: torch.zeros(s) for n, s in originals.items()}).items()}
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        module = dialect.prefix + (name.replace(".", "_") if dialect.flat else name)
        made, deltas[name] = KINDS[kind](module, shape)
        tensors |= made
    return tensors, split(deltas) if dialect.layout == "original" else deltas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: f"{d.prefix}{d.layout}")
def test_every_dialect_with_every_kind(dialect: Dialect, kind: str, shapes: dict[str, tuple[int, int]]) -> None:
    tensors, expected = written(dialect, kind)
    found = load_lora(tensors, shapes=shapes)
    assert set(found.updates) == set(expected) == set(shapes)
    for name, update in found.updates.items():
        torch.testing.assert_close(dense(update), expected[name], rtol=1e-5, atol=1e-5)


def test_q_k_and_v_in_one_matrix_of_diffusers(shapes: dict[str, tuple[int, int]]) -> None:
    tensors, delta = loha("transformer.transformer_blocks.1.attn.to_added_qkv", (96, 32))
    found = load_lora(tensors, shapes=shapes)
    for name, part in zip(("add_q_proj", "add_k_proj", "add_v_proj"), delta.chunk(3), strict=True):
        torch.testing.assert_close(dense(found.updates[f"transformer_blocks.1.attn.{name}"]), part)


def test_other_kinds_have_other_digests(shapes: dict[str, tuple[int, int]]) -> None:
    """Of the same values, as far as they can be."""
    module, a, b = "double_blocks.0.img_attn.proj", torch.ones(32, 4), torch.ones(4, 32)
    files = [
        {f"{module}.lora_A.weight": b, f"{module}.lora_B.weight": a},
        {f"{module}.lora_A.weight": b, f"{module}.lora_B.weight": a, f"{module}.alpha": torch.tensor(2.0)},
        {f"{module}.hada_w1_a": a, f"{module}.hada_w1_b": b, f"{module}.hada_w2_a": a, f"{module}.hada_w2_b": b},
        {f"{module}.lokr_w1": a[:8], f"{module}.lokr_w2": b[:, :8]},
        {f"{module}.diff": 4 * torch.ones(32, 32)},
        {f"{module}.diff": torch.ones(32, 32)},
        {"double_blocks.0.txt_attn.proj.diff": torch.ones(32, 32)},
    ]
    assert len({load_lora(file, shapes=shapes).digest for file in files}) == len(files)


def test_digests_of_before() -> None:
    """They are part of keys that are stored: those of these files may never change."""
    from tests.support.lora_files import EVERYWHERE, PAIRS, deltas, kohya, original

    shapes = {name: (value.shape[0], value.shape[1]) for name, value in deltas(PAIRS).items()}
    half = {name: (down.bfloat16(), up.bfloat16()) for name, (down, up) in EVERYWHERE.items()}
    up, generator = torch.zeros(96, 6), torch.Generator().manual_seed(5)
    for i in range(3):
        up[32 * i : 32 * i + 32, 2 * i : 2 * i + 2] = torch.randn(32, 2, generator=generator)
    apart = {"double_blocks.1.txt_attn.qkv": (torch.randn(6, 32, generator=generator), up)}
    generator, module = torch.Generator().manual_seed(6), "lycoris_transformer_blocks_1_attn_to_q"
    whole = {f"{module}.lokr_w{i}": torch.randn(n, n, generator=generator) for i, n in ((1, 4), (2, 8))}
    for tensors, digest in (
        (original(PAIRS, alpha=2.0), "a088c6ce81b32fa2f675e422ff6e342cab9cb3cbe55ae7fcc8a9dd829ebcc3c9"),
        (kohya(half, alpha=4 / 3), "5e89ea4771c381b08b63a352474efb719bec9904fdb419e903327efcb5c0617b"),
        (kohya(apart, alpha=3.0), "5ce8a1c5a05982646c916d1475ac2e4c1d84bb9a79378d1ba7874a1a1b54eac5"),
        (
            whole | {f"{module}.alpha": torch.tensor(1.0)},
            "dbf8fea2c07573f4a72dba3fc6df1210ae985c6eb6c38a128e903146077393c8",
        ),
    ):
        assert load_lora(tensors, shapes=shapes).digest == digest


ONE = "double_blocks.0.img_attn.proj"
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA": ({"dora_scale": torch.ones(32, 1)}, "of a DoRA, which rescales"),
    "DoRA of PEFT": ({"lora_magnitude_vector.default.weight": torch.ones(32)}, "of a DoRA, which rescales"),
    "OFT of PEFT": (
        {"oft_R.default.weight": torch.ones(4, 28)},
        "PEFT's OFT, whose rotation .*merge it into its model",
    ),
    "BOFT": ({"oft_blocks": torch.ones(2, 4, 8, 8)}, "of a BOFT, .*merge it into its model"),
    "rescaled": ({"oft_blocks": torch.ones(4, 8, 8), "rescale": torch.ones(32, 1)}, "of a rescaled OFT"),
    "OFT without weights": ({"oft_blocks": torch.ones(4, 8, 8)}, "is an OFT, .*load the model without quantize"),
    "GLoRA": ({"a1.weight": torch.ones(4, 4)}, "of a GLoRA, .*merge it"),
    "IA3": ({"weight": torch.ones(32), "on_input": torch.tensor(True)}, r"of a \(IA\)\^3, .*merge it"),
    "T-LoRA": ({"lambda_layer": torch.ones(1, 4)}, "of a T-LoRA, .*use a plain LoRA"),
    "AdaLoRA": ({"lora_E": torch.ones(4, 1)}, "of an AdaLoRA"),
    "Tucker": (
        {"lokr_t2": torch.ones(4, 4, 3, 3)},
        "a convolution's update, and this transformer has none|no convolutions",
    ),
    "bias of a difference": ({"diff_b": torch.ones(32)}, "is a bias, .*train without biases"),
    "set weight": ({"set_weight": torch.ones(32, 32)}, "is a replaced weight"),
    "alpha of a difference": (
        {"diff": torch.ones(32, 32), "alpha": torch.tensor(1.0)},
        "a difference of weights has no alpha",
    ),
    "two kinds": ({"diff": torch.ones(32, 32), "lokr_w1": torch.ones(4, 4)}, "make no update of one kind"),
    "LoHa without a factor": ({"hada_w1_a": torch.ones(32, 2)}, "hada_w1_a has no hada_w1_b beside it"),
    "LoHa of two shapes": (
        {f"hada_w{i}_{s}": torch.ones(*((32, 2) if s == "a" else (2, 16 * i))) for i in (1, 2) for s in "ab"},
        "products of different shapes",
    ),
    "infinite alpha": (
        {"lokr_w1": torch.ones(4, 4), "lokr_w2_a": torch.ones(8, 2), "lokr_w2_b": torch.ones(2, 8)}
        | {"alpha": torch.tensor(float("inf"))},
        "alpha holds values that are not finite; .*save it in float32",
    ),
    "two adapters": (
        {f"lora_{s}.{name}.weight": torch.ones(4, 4) for s in "AB" for name in ("one", "two")},
        "lora_A.one.weight and .*lora_A.two.weight are the same part of one update; keep one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case: str, shapes: dict[str, tuple[int, int]]) -> None:
    parts, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as error:
        load_lora({f"{ONE}.{part}": value for part, value in parts.items()}, shapes=shapes, strict=False)
    assert ONE in str(error.value)
    assert "\n" not in str(error.value)


def test_inspect_names_dialect_and_kind(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dialect, kind in zip(DIALECTS, [*KINDS, *KINDS], strict=False):
        file = write(tmp_path, written(dialect, kind)[0])
        assert main(["inspect", str(file), "--model", str(tiny_folder)]) == 0
        out = capsys.readouterr().out
        assert f"dialect: {dialect.title} (" in out
        assert f"lora: {kind.partition(' ')[0]} of " in out
        assert "  digest " in out
    bad = write(tmp_path, {f"{ONE}.dora_scale": torch.ones(32, 1), "lora_te_x.alpha": torch.ones(())})
    assert main(["inspect", str(bad)]) == 1
    out = capsys.readouterr().out
    assert "unexpected: lora_te_x.alpha" in out
    assert "is of a DoRA" in out


def test_norms_are_named(shapes: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(CheckpointError, match=r"query_norm.diff\).*; changes of norms are not supported"):
        load_lora({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.ones(8)}, shapes=shapes)


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    text = (DOCS / "compatibility.md").read_text()
    assert text == runpy.run_path(str(DOCS / "loras.py"))["document"](text), (
        "docs/compatibility.md is out of date: .venv/bin/python docs/loras.py renews it"
    )
