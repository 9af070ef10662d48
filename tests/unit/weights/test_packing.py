"""Formats of other tools: what comfy-kitchen writes is read as comfy-kitchen reads it; what is unclear is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorCoreMXFP8Layout, TensorCoreNVFP4Layout, TensorWiseINT8Layout
from safetensors import safe_open
from tests.support import checkpoints as made
from torch import Tensor

from limner import CheckpointError
from limner.model.int8 import quantize_weight
from limner.weights.convert import convert
from limner.weights.files import SafetensorsFile
from limner.weights.folder import load_transformer
from limner.weights.inspect import inspect
from limner.weights.layouts import PARTS
from limner.weights.packing import FORMATS, Packing, packings_of
from limner.weights.parts import open_part
from limner.weights.unpack import unpack

CPU = torch.device("cpu")
ERRORS = {one.name: one.error for one in FORMATS}
ROWS = {"per_channel": True, "is_weight": True}
CONVROT = {"convrot": True, "convrot_groupsize": 64}
WRITTEN: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "fp8": (TensorCoreFP8Layout, {}, {"format": "float8_e4m3fn"}, "fp8"),
    "int8": (TensorWiseINT8Layout, {}, {"format": "int8_tensorwise"}, "int8_tensorwise"),
    "int8 rows": (TensorWiseINT8Layout, ROWS, {"format": "int8_tensorwise", "per_row": True}, "int8_tensorwise"),
    "convrot": (TensorWiseINT8Layout, ROWS | CONVROT, {"format": "int8_tensorwise"} | CONVROT, "int8_convrot"),
    "mxfp8": (TensorCoreMXFP8Layout, {}, {"format": "mxfp8"}, "mxfp8"),
    "nvfp4": (TensorCoreNVFP4Layout, {}, {"format": "nvfp4", "full_precision_matrix_mult": True}, "nvfp4"),
}
"""The writer's class and arguments, the marker, and the format's name here."""


def marker(about: object) -> Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def stored(kind: str, name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as the library stores it, and in float32 as the library reads it."""
    layout, arguments, _, _ = WRITTEN[kind]
    data, params = layout.quantize(value.float(), **arguments)
    return {f"{name}{last}": part for last, part in layout.state_dict_tensors(data, params).items()}, layout.dequantize(
        data, params
    )


def file_of(
    state: dict[str, Tensor], path: Path, kind: Callable[[str], str], *, header: bool = False, prefix: str = ""
) -> tuple[Path, dict[str, Tensor]]:
    """A file in the original names whose matrices of blocks are in the formats that `kind` gives, and what it stands for."""
    tensors, wide, layers = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()
    for name, value in made.original(state).items():
        if made.quantized_matrix(name, value) and kind(name):
            parts, wide[name] = stored(kind(name), name, value)
            tensors |= parts
            layers[name.removesuffix(".weight")] = WRITTEN[kind(name)][2]
        else:
            tensors[name] = wide[name] = value
    if header:
        about = {"format_version": "1.0", "layers": {prefix + name: mark for name, mark in layers.items()}}
        return made.save(tensors, path, prefix=prefix, _quantization_metadata=json.dumps(about)), wide
    tensors |= {f"{name}.comfy_quant": marker(mark) for name, mark in layers.items()}
    return made.save(tensors, path, prefix=prefix), wide


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own conversion of an original file."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    found: dict[str, Tensor] = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    return found


def away(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("kind", WRITTEN)
def test_what_comfy_kitchen_writes(kind: str, header: bool, wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    prefix = "model.diffusion_model." if header else ""
    file, wide = file_of(wide_state, tmp_path / "a.safetensors", lambda _: kind, header=header, prefix=prefix)
    found = open_part("transformer", file)
    assert (found.layout.kind, found.natural_dtype) == (WRITTEN[kind][3], torch.bfloat16)
    expected = converted(wide)
    exact = load_transformer(file, dtype=torch.float32, device=CPU).state_dict()
    assert exact.keys() == expected.keys()
    for name, value in expected.items():
        if kind == "convrot":  # products of 64, in another order: a few units in the last place of float32
            assert (exact[name] - value).abs().max() <= 2e-6 * value.abs().max(), name
        else:
            assert torch.equal(exact[name], value.float()), name
    loaded = load_transformer(file, dtype=None, device=CPU).state_dict()
    assert all(torch.equal(loaded[name], exact[name].bfloat16()) for name in expected)
    int8 = load_transformer(file, dtype=None, device=CPU, quantize="int8").state_dict()
    bound = ERRORS[WRITTEN[kind][3]]
    assert bound is not None
    for name, value in wide_state.items():
        if "transformer_blocks" in name and value.dim() == 2:
            assert 0 < away(loaded[name], value) < bound, name
            assert 0 < away(int8[name].float() * int8[f"{name}_scale"][:, None], value) < bound, name


def test_int8_of_others_is_not_rounded_again(wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    """With `quantize="int8"` values and scales are those of the file, of each third of a fused projection too."""
    for kind in ("int8", "int8 rows"):
        file, wide = file_of(wide_state, tmp_path / f"{kind}.safetensors", lambda _, kind=kind: kind)
        int8, expected = load_transformer(file, dtype=None, device=CPU, quantize="int8").state_dict(), converted(wide)
        for name in ("transformer_blocks.0.attn.to_v.weight", "single_transformer_blocks.0.attn.to_out.weight"):
            assert torch.equal(int8[name].float() * int8[f"{name}_scale"][:, None], expected[name])


def test_formats_mixed_in_one_file(wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    """As in published files: most of it NVFP4, what is sensitive fp8 or wide."""

    def kind(name: str) -> str:
        return "fp8" if "txt_attn" in name else "" if "linear2" in name else "nvfp4"

    file, wide = file_of(wide_state, tmp_path / "mixed.safetensors", kind, header=True)
    assert open_part("transformer", file).layout.kind == "fp8+nvfp4"
    loaded = load_transformer(file, dtype=torch.float32, device=CPU).state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in converted(wide).items())


def test_filled_up_matrices_and_rows_of_them(tmp_path: Path) -> None:
    """Writers fill rows and columns up to 16 or 32 and scales to tiles of 128 x 4; the marker has the shape before."""
    torch.manual_seed(5)
    for shape in ((130, 48), (96, 200)):
        for kind in ("mxfp8", "nvfp4"):
            value = torch.randn(shape)
            parts, wide = stored(kind, "a.weight", value)
            parts["a.comfy_quant"] = marker(WRITTEN[kind][2] | {"orig_shape": list(shape)})
            file = SafetensorsFile(made.save(parts, tmp_path / "a.safetensors"))
            packing = packings_of(file, file.infos, "")["a.weight"]
            tensors = [file.read(name) for name in ("a.weight", *packing.beside)]
            found = unpack(packing, *tensors, rows=slice(30, 77), dtype=torch.float32)
            assert torch.equal(found, wide[30:77, : shape[1]])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_one_scale_a_square(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 128 as in Qwen3's FP8, other sides by the marker; the last squares are cut. By hand, value by value."""
    monkeypatch.setattr("limner.weights.unpack.VALUES_AT_ONCE", 300 * 50)  # several steps, across squares
    torch.manual_seed(5)
    value = (torch.randn(200, 300) * 20).to(dtype)
    for side, name, mark in (
        (128, "weight_scale_inv", None),
        (64, "weight_scale", {"format": "int8_blockwise", "group_size": 64}),
    ):
        scale = torch.rand(-(-200 // side), -(-300 // side)) + 0.5
        tensors = {"a.weight": value, f"a.{name}": scale}
        if mark is not None:
            form = mark["format"] if dtype == torch.int8 else "float8_e4m3fn_blockwise"
            tensors["a.comfy_quant"] = marker(mark | {"format": form})
        file = SafetensorsFile(made.save(tensors, tmp_path / "a.safetensors"))
        packing = packings_of(file, file.infos, "")["a.weight"]
        assert packing.format == ("int8_blocks" if dtype == torch.int8 else "fp8_blocks")
        expected = torch.stack(
            [
                torch.stack([value[r, c].float() * scale[r // side, c // side] for c in range(300)])
                for r in range(90, 140)
            ]
        )
        found = unpack(packing, value, scale, rows=slice(90, 140), dtype=torch.float32)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_what_squares_lose(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    value, top = torch.randn(256, 384), 448 if dtype.is_floating_point else 127
    squares = value.view(2, 128, 3, 128).transpose(1, 2)
    scale = squares.abs().amax((2, 3)) / top
    narrow = squares / scale[:, :, None, None]
    narrow = (narrow if dtype.is_floating_point else narrow.round()).to(dtype).transpose(1, 2).reshape(256, 384)
    form = "fp8_blocks" if dtype.is_floating_point else "int8_blocks"
    packing = Packing(format=form, shape=(256, 384), dtype=dtype, scale="s", group=128, side=128)
    bound = ERRORS[form]
    assert bound is not None
    assert away(unpack(packing, narrow, scale, rows=None, dtype=torch.bfloat16), value) < bound


def test_what_our_int8_loses() -> None:
    torch.manual_seed(6)
    value = torch.randn(256, 384)
    weight, scale = quantize_weight(value)
    bound = ERRORS["int8"]
    assert bound is not None
    assert away(weight.float() * scale[:, None], value) < bound


def test_qwen3_in_fp8(tiny_folder: Path, tiny_copy: Path) -> None:
    """A text encoder's folder as transformers saves it: `weight_scale_inv` beside each matrix, a note in config.json."""
    from limner import Pipeline

    tensors, wide = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in made.tensors_of(tiny_folder / made.TEXT).items():
        tensors[name] = wide[name] = value
        if made.quantized_matrix(name, value):
            scale = value.abs().max().reshape(1, 1) / 448
            tensors[name], tensors[f"{name}_scale_inv"] = (value / scale).to(torch.float8_e4m3fn), scale
            wide[name] = tensors[name].float() * scale
    made.save(tensors, tiny_copy / made.TEXT)
    config = tiny_copy / "text_encoder" / "config.json"
    note = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": note}))
    state = Pipeline.from_pretrained(tiny_copy, torch_dtype=torch.float32).text_encoder.network.state_dict()
    assert len(state) > 20
    assert all(torch.equal(value, wide[f"model.{name}"]) for name, value in state.items())


def test_fp8_without_scales_is_what_it_says(wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    original = made.original(wide_state)
    raw = {n: v.to(torch.float8_e4m3fn) if made.quantized_matrix(n, v) else v for n, v in original.items()}
    file = made.save(raw, tmp_path / "raw.safetensors")
    assert open_part("transformer", file).layout.kind == "fp8_raw"
    loaded = load_transformer(file, dtype=None, device=CPU).state_dict()
    assert all(torch.equal(loaded[name], v) for name, v in converted({n: v.bfloat16() for n, v in raw.items()}).items())
    scaled, _ = made.fp8(original)
    lost = {n: v for n, v in scaled.items() if not n.endswith("_scale") and n != "scaled_fp8"}
    with pytest.raises(CheckpointError, match="values over 224, which no weights have: the file has lost its scales"):
        load_transformer(made.save(lost, tmp_path / "lost.safetensors"), dtype=None, device=CPU)
    raw["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)  # says that there are scales
    with pytest.raises(CheckpointError, match="without a scale"):
        open_part("transformer", made.save(raw, tmp_path / "marked.safetensors"))


LINEAR = "single_blocks.0.linear2"
BAD_MARKS: dict[str, tuple[object, str]] = {
    "not json": (b"{", "comfy_quant is not JSON"),
    "another format": ({"format": "convrot_w4a4"}, "says format='convrot_w4a4', which is not read; allowed: "),
    "another rotation": (
        {"format": "int8_tensorwise", "quarot": True},
        "says quarot=True, of which it is not known how it changes the weights",
    ),
    "a rotation of other sizes": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100},
        "convrot_groupsize=100; a rotation is undone for",
    ),
    "groups that do not fit": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4096},
        "says groups of 4096 columns are rotated",
    ),
    "a rotation in words": (
        {"format": "int8_tensorwise", "convrot": "no"},
        "says convrot='no', which has to be true or",
    ),
    "a rotation of fp8": ({"format": "float8_e4m3fn", "convrot": True}, "a rotation is undone for int8_tensorwise"),
    "another dtype": ({"format": "nvfp4"}, "is I8, and .*comfy_quant says nvfp4; the file is damaged"),
    "code": ({"format": "int8_tensorwise", "auto_map": {"a": "b"}}, "names code to run"),
}


@pytest.mark.parametrize("name", BAD_MARKS)
def test_refuses_markers(name: str, wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    mark, message = BAD_MARKS[name]
    file, _ = file_of(wide_state, tmp_path / "good.safetensors", lambda _: "int8 rows")
    tensors = made.tensors_of(file)
    tensors[f"{LINEAR}.comfy_quant"] = (
        torch.tensor(list(mark), dtype=torch.uint8) if isinstance(mark, bytes) else marker(mark)
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        open_part("transformer", made.save(tensors, tmp_path / "bad.safetensors"))
    assert "\n" not in str(caught.value)
    assert "bad.safetensors" in str(caught.value)


def test_refuses_a_rotation_that_only_the_header_mentions(wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    file, _ = file_of(wide_state, tmp_path / "a.safetensors", lambda _: "int8 rows")
    plain = {name: v for name, v in made.tensors_of(file).items() if not name.endswith("comfy_quant")}
    assert open_part("transformer", made.save(plain, tmp_path / "plain.safetensors")).layout.kind == "int8_tensorwise"
    for key, text in (("convrot", "true"), ("quantization", "int8_convrot")):
        with pytest.raises(CheckpointError, match=f"the header says {key}='{text}'; weights that are rotated"):
            open_part("transformer", made.save(plain, tmp_path / "said.safetensors", **{key: text}))
    open_part("transformer", made.save(plain, tmp_path / "not.safetensors", convrot="false"))


def test_a_header_names_layers_in_its_own_way(wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    """With another prefix than tensors, or with `.weight`. A layer that is not found does not leave a rotation unseen."""
    file, _ = file_of(wide_state, tmp_path / "a.safetensors", lambda _: "convrot", prefix="model.diffusion_model.")
    tensors = made.tensors_of(file)
    plain = {name: v for name, v in tensors.items() if not name.endswith("comfy_quant")}
    layers = {
        name.removesuffix(".comfy_quant").removeprefix("model.diffusion_model."): WRITTEN["convrot"][2]
        for name in tensors
        if name.endswith("comfy_quant")
    }

    def save(layers: dict[str, Any]) -> Path:
        return made.save(plain, tmp_path / "b.safetensors", _quantization_metadata=json.dumps({"layers": layers}))

    expected = load_transformer(file, dtype=None, device=CPU).state_dict()
    for said in ("{}", "diffusion_model.{}", "{}.weight"):
        saved = save({said.format(name): about for name, about in layers.items()})
        state = load_transformer(saved, dtype=None, device=CPU).state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    saved = save({name.replace("linear2", "elsewhere"): about for name, about in layers.items()})
    with pytest.raises(CheckpointError, match="linear2.weight has no marker .* says that weights are rotated"):
        open_part("transformer", saved)
    tensors["model.diffusion_model.else.comfy_quant"] = marker({"format": "int8_tensorwise"})
    with pytest.raises(CheckpointError, match="else.comfy_quant is the marker of a weight that is not there"):
        open_part("transformer", made.save(tensors, tmp_path / "c.safetensors"))


def test_parts_of_one_file_in_formats_of_their_own(
    wide_state: dict[str, Tensor], tiny_folder: Path, tmp_path: Path
) -> None:
    """The header marks the transformer alone; the text encoder beside it is fp8 without scales, the autoencoder wide."""
    prefix = "model.diffusion_model."
    file, _ = file_of(wide_state, tmp_path / "a.safetensors", lambda _: "convrot", header=True, prefix=prefix)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = made.tensors_of(file)
    text = {n.removeprefix("model."): v for n, v in made.tensors_of(tiny_folder / made.TEXT).items()}
    tensors |= {
        f"text_encoders.qwen3_4b.transformer.model.{n}": v.to(torch.float8_e4m3fn) if v.dim() == 2 else v
        for n, v in text.items()
        if n != "lm_head.weight"
    }
    tensors |= {f"vae.{n}": v for n, v in made.tensors_of(tiny_folder / made.VAE).items()}
    whole = made.save(tensors, tmp_path / "whole.safetensors", **header)
    kinds = [open_part(p, whole, like=tiny_folder / p / "config.json").layout.kind for p in PARTS]
    assert kinds == ["int8_convrot", "diffusers", "fp8_raw"]


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no marker": (drop(f"{LINEAR}.comfy_quant"), "linear2.weight is U8 without a marker"),
    "no scales": (drop(f"{LINEAR}.weight_scale"), "linear2.weight is U8 .nvfp4. and has no .*weight_scale"),
    "no second scale": (drop(f"{LINEAR}.weight_scale_2"), "is nvfp4 and has no single_blocks.0.linear2.weight_scale_2"),
    "scales of another shape": (
        put(f"{LINEAR}.weight_scale", torch.zeros(256, 63).to(torch.float8_e4m3fn)),
        r"weight_scale is F8_E4M3 \[256, 63\]; nvfp4 of \[256, 1024\] needs F8_E4M3 \[256, 64\], in tiles",
    ),
    "scales of mxfp8": (put(f"{LINEAR}.weight_scale", torch.ones(256, 64)), r"weight_scale is F32 \[256, 64\]; nvfp4"),
    "no weight": (drop(f"{LINEAR}.weight"), "comfy_quant is the marker of a weight that is not there"),
    "smoothing": (
        put(f"{LINEAR}.pre_quant_scale", torch.ones(1024)),
        "quantized by a smoothing of activations .*pre_quant_scale.*; take a file in fp8",
    ),
    "bitsandbytes": (put(f"{LINEAR}.weight.absmax", torch.ones(4)), "is quantized by bitsandbytes, which is not read"),
    "nunchaku": (put(f"{LINEAR}.qweight", torch.ones(4)), "is quantized by GPTQ, AWQ or Nunchaku"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_damage(name: str, wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    file, _ = file_of(wide_state, tmp_path / "good.safetensors", lambda _: "nvfp4")
    tensors = made.tensors_of(file)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_part("transformer", made.save(tensors, tmp_path / "bad.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["convrot", "mxfp8", "nvfp4"])
def test_inspected_and_converted(kind: str, wide_state: dict[str, Tensor], tmp_path: Path) -> None:
    """Each is named, counted whole, and a source of every layout that is written."""
    file, _ = file_of(wide_state, tmp_path / "a.safetensors", lambda _: kind, header=True)
    report = inspect(file, verify=True)
    (part,) = report.parts
    assert (part.layout, part.loads_as, part.whole) == (WRITTEN[kind][3], "bfloat16", True)
    with safe_open(file, framework="pt") as opened:
        assert part.num_tensors == len(list(opened.keys()))
    expected = load_transformer(file, dtype=None, device=CPU).state_dict()
    convert(file, tmp_path / "folder", to="diffusers")
    convert(file, tmp_path / "one.safetensors", to="original")
    for place in (tmp_path / "folder", tmp_path / "one.safetensors"):
        state = load_transformer(place, dtype=None, device=CPU).state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    convert(file, tmp_path / "int8", to="int8")
    narrow = load_transformer(file, dtype=None, device=CPU, quantize="int8").state_dict()
    state = load_transformer(tmp_path / "int8", dtype=None, device=CPU).state_dict()
    assert all(torch.equal(state[name], value) for name, value in narrow.items())
