"""Every layout gives the same model; what is none of them is refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import checkpoints as made
from tests.support.checkpoints import TEXT, TRANSFORMER, VAE, close, draw, sparse, tensors_of
from tests.support.tiny import make_transformer, picture

from limner import CheckpointError, Pipeline
from limner.config import KLEIN_4B, TransformerConfig
from limner.weights.files import TensorFile, TensorInfo
from limner.weights.folder import load_transformer
from limner.weights.layouts import recognise
from limner.weights.parts import open_part

CPU = torch.device("cpu")


def converted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own conversion of an original file."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    found: dict[str, torch.Tensor] = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_file_is_what_diffusers_makes_of_it(
    prefix: str, wide_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tensors = made.original(wide_state)
    assert same(converted(tensors), wide_state)  # the tests' file is the original's, not only ours
    file = made.save(tensors, tmp_path / "model.safetensors", prefix=prefix)
    loaded = load_transformer(file, dtype=None, device=CPU)
    assert same(loaded.state_dict(), wide_state)
    layout = open_part("transformer", file).layout
    assert (layout.kind, layout.prefix) == ("comfyui" if prefix else "original", prefix)
    assert (loaded.config.num_double_blocks, loaded.config.num_single_blocks, loaded.config.num_heads) == (1, 1, 2)
    assert (loaded.config.rope_axes, loaded.config.rope_theta) == ((32, 32, 32, 32), 2000)


def test_parts_of_a_fused_projection_are_views(wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = made.save(made.original(wide_state), tmp_path / "model.safetensors")
    attn = load_transformer(file, dtype=None, device=CPU).transformer_blocks[0].attn
    q, k, v = attn.to_q.weight, attn.to_k.weight, attn.to_v.weight
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == q.nbytes
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_a_wide_file_takes_no_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    state = {n: v.bfloat16() for n, v in make_transformer(256, double=2, single=2).state_dict().items()}
    folder = tmp_path / "transformer"  # heads of 256 are not klein's: a configuration beside the file says the rest
    folder.mkdir()
    config = TransformerConfig(
        num_double_blocks=2,
        num_single_blocks=2,
        num_heads=2,
        head_dim=256,
        text_width=48,
        in_channels=16,
        out_channels=16,
        rope_axes=(64,) * 4,
        time_channels=32,
    )
    (folder / "config.json").write_text(json.dumps(config.to_diffusers()))
    file = made.save(made.original(state), folder / "model.safetensors")
    size = file.stat().st_size
    assert size > 40e6
    load_transformer(file, dtype=None, device=CPU)
    before = anonymous()
    loaded = load_transformer(file, dtype=None, device=CPU)
    assert anonymous() - before < size / 5
    assert loaded.config == config


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_key_of_references_does_not_depend_on_the_layout(prefix: str, tiny_folder: Path, tmp_path: Path) -> None:
    whole = Pipeline.from_pretrained(tiny_folder)
    file = made.save(
        made.original(tensors_of(tiny_folder / TRANSFORMER)), tmp_path / "model.safetensors", prefix=prefix
    )
    vae = made.save(made.original_vae(tensors_of(tiny_folder / VAE)), tmp_path / "ae.safetensors")
    text = made.save(tensors_of(tiny_folder / TEXT), tmp_path / "text.safetensors")
    mixed = Pipeline.from_pretrained(tiny_folder, transformer=file, vae=str(vae), text_encoder=text)
    assert mixed.reference_weights == whole.reference_weights
    assert mixed.digest == whole.digest
    assert mixed.prefill(picture(64, 64)).key == whole.prefill(picture(64, 64)).key
    close(draw(mixed), draw(whole))


def test_parts_given_may_be_missing_from_the_folder(tiny_copy: Path, tmp_path: Path) -> None:
    expected = Pipeline.from_pretrained(tiny_copy).digest
    shutil.copytree(tiny_copy, tmp_path / "other")
    for part in ("transformer", "vae"):
        shutil.rmtree(tiny_copy / part)
    with pytest.raises(CheckpointError, match="has no transformer, vae"):
        Pipeline.from_pretrained(tiny_copy)
    found = Pipeline.from_pretrained(tiny_copy, transformer=tmp_path / "other", vae=tmp_path / "other" / "vae")
    assert found.digest == expected
    with pytest.raises(CheckpointError, match="transformer: .*nowhere is neither a folder nor a hub id"):
        Pipeline.from_pretrained(tiny_copy, transformer=tmp_path / "nowhere", vae=tmp_path / "other")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_norms_may_end_in_weight(prefix: str, wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """As in files that went through ComfyUI's modules; in GGUF too."""
    tensors = {name.replace("_norm.scale", "_norm.weight"): v for name, v in made.original(wide_state).items()}
    assert "single_blocks.0.norm.query_norm.weight" in tensors
    file = made.save(tensors, tmp_path / "model.safetensors", prefix=prefix)
    assert same(load_transformer(file, dtype=None, device=CPU).state_dict(), wide_state)
    if not prefix:
        packed = made.save_gguf(tensors.items(), tmp_path / "model.gguf", kind="BF16", plain="BF16")
        assert same(load_transformer(packed, dtype=None, device=CPU).state_dict(), wide_state)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight"])
def test_fp8(per_row: bool, scale: str, wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """weight * scale, in float32, rounded once; then what diffusers makes of these names."""
    stored, wide = made.fp8({n: v.float() for n, v in made.original(wide_state).items()}, scale=scale, per_row=per_row)
    file = made.save(stored, tmp_path / "fp8.safetensors")
    found = open_part("transformer", file)
    assert (found.layout.kind, found.natural_dtype) == ("fp8", torch.bfloat16)
    loaded = load_transformer(file, dtype=None, device=CPU)
    assert same(loaded.state_dict(), converted(wide))
    int8 = load_transformer(file, dtype=None, device=CPU, quantize="int8").state_dict()
    name = "transformer_blocks.0.attn.to_v.weight"
    assert int8[name].dtype == torch.int8
    back = int8[name].float() * int8[f"{name}_scale"][:, None]
    assert (back - converted(wide)[name].float()).norm() < 0.01 * back.norm()


def test_int8_with_fused_projections(wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """One scale for each row of q, k and v together: each takes its third."""
    from limner.model.int8 import quantize_weight

    stored = {}
    for name, value in made.original(wide_state).items():
        if made.quantized_matrix(name, value):
            stored[name], stored[f"{name}_scale"] = quantize_weight(value)
        else:
            stored[name] = value
    file = made.save(stored, tmp_path / "int8.safetensors")
    found = load_transformer(file, dtype=None, device=CPU)
    plain = made.save(made.original(wide_state), tmp_path / "wide.safetensors")
    assert found.quantization == "int8"
    assert same(found.state_dict(), load_transformer(plain, dtype=None, device=CPU, quantize="int8").state_dict())
    stored["single_blocks.0.linear2.weight"] = wide_state["single_transformer_blocks.0.attn.to_out.weight"]
    del stored["single_blocks.0.linear2.weight_scale"]
    with pytest.raises(CheckpointError, match="single_blocks.0.linear2.weight is not int8, others are"):
        load_transformer(made.save(stored, tmp_path / "half.safetensors"), dtype=None, device=CPU)


def test_a_transformer_has_one_dtype(wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tensors = {n: v.float() if "norm" in n else v for n, v in made.original(wide_state).items()}
    loaded = load_transformer(made.save(tensors, tmp_path / "mixed.safetensors"), dtype=None, device=CPU)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}


def test_other_networks_have_one_dtype_too(tiny_folder: Path, tmp_path: Path) -> None:
    """bfloat16 matrices beside float32 norms run as they do where all is cast; statistics of latents keep their dtype."""
    text = {n: v if "norm" in n else v.bfloat16() for n, v in tensors_of(tiny_folder / TEXT).items()}
    vae = {
        n: v if "norm" in n or n.startswith("bn.") else v.bfloat16() for n, v in tensors_of(tiny_folder / VAE).items()
    }
    pipe = Pipeline.from_pretrained(
        tiny_folder,
        text_encoder=made.save(text, tmp_path / "text.safetensors"),
        vae=made.save(vae, tmp_path / "vae.safetensors"),
    )
    assert {v.dtype for v in pipe.text_encoder.network.state_dict().values()} == {torch.bfloat16}
    found = {n: v.dtype for n, v in pipe.autoencoder.network.state_dict().items()}
    assert {v for n, v in found.items() if not n.startswith("bn.")} == {torch.bfloat16}
    assert found["bn.running_mean"] == torch.float32
    assert draw(pipe).isfinite().all()


def test_a_decoder_of_other_widths(tiny_folder: Path, tmp_path: Path) -> None:
    """Alone, in either naming: the decoder's widths are those of the file, the rest those of the model."""
    from diffusers import AutoencoderKLFlux2

    config = json.loads((tiny_folder / "vae" / "config.json").read_text())
    narrow = [width // 2 for width in config["block_out_channels"]]
    assert not any(width % config["norm_num_groups"] for width in narrow)
    torch.manual_seed(4)
    state = AutoencoderKLFlux2.from_config(config | {"decoder_block_out_channels": narrow}).state_dict()
    like = tiny_folder / "vae" / "config.json"
    levels = len(narrow)
    for number, tensors in enumerate((state, made.original_vae(state, levels=levels))):
        found = open_part("vae", made.save(tensors, tmp_path / f"{number}.safetensors"), like=like)
        assert found.config["decoder_block_out_channels"] == narrow
        assert same(dict(found.stream(state)), state)
    odd = {n: torch.cat([v, v]) if n == "encoder.conv_in.weight" else v for n, v in state.items()}
    wrong = open_part("vae", made.save(odd, tmp_path / "odd.safetensors"), like=like)
    with pytest.raises(CheckpointError, match="encoder.conv_in.weight is .*; these weights are of another model"):
        wrong.check(state)


def test_autoencoder_is_what_diffusers_makes_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = tensors_of(tiny_folder / VAE)
    tensors = made.original_vae(state)
    config = json.loads((tiny_folder / "vae" / "config.json").read_text())
    theirs = convert_ldm_vae_checkpoint(dict(tensors), config)
    assert len(theirs) > 100  # diffusers' table lacks the statistics and the two convolutions inside
    rest = ("bn.", "quant_conv", "post_quant_conv")
    assert same(theirs, {name: value for name, value in state.items() if not name.startswith(rest)})
    file = made.save(tensors, tmp_path / "ae.safetensors")
    found = open_part("vae", file, like=tiny_folder / "vae" / "config.json")
    assert found.layout.kind == "original"
    assert same(dict(found.stream(state)), state)
    outside = {name.replace("encoder.quant", "quant").replace("decoder.post", "post"): v for name, v in tensors.items()}
    del outside["bn.num_batches_tracked"]
    beside = open_part("vae", made.save(outside, tmp_path / "b.safetensors"), like=tiny_folder / "vae" / "config.json")
    assert same(dict(beside.stream(state)), state)


def test_published_autoencoder_and_text_encoder_need_no_folder(tmp_path: Path) -> None:
    """What a single file's shapes do not say is that of klein where they are klein's."""
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        vae = AutoencoderKLFlux2().state_dict()
        text = Qwen3Model(
            Qwen3Config(
                hidden_size=2560,
                intermediate_size=9728,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                num_hidden_layers=28,
                vocab_size=151936,
            )
        ).state_dict()
    file = sparse(made.original_vae(vae), tmp_path / "ae.safetensors")
    found = open_part("vae", file)
    assert (found.config["norm_num_groups"], found.config["latent_channels"]) == (32, 32)
    assert str(found.problems(vae)) == ""
    encoder = open_part("text_encoder", sparse({f"model.{n}": v for n, v in text.items()}, tmp_path / "q.safetensors"))
    assert (encoder.config["num_hidden_layers"], encoder.config["rope_theta"]) == (36, 1e6)


def test_text_encoder_files(tiny_folder: Path, tmp_path: Path) -> None:
    """A language model, a base model, an all-in-one file, fp8, and one that was cut after the last layer that is read."""
    whole, state = Pipeline.from_pretrained(tiny_folder), tensors_of(tiny_folder / TEXT)
    base = {name.removeprefix("model."): v for name, v in state.items() if name != "lm_head.weight"}
    cut = {name: v for name, v in state.items() if not name.startswith(("model.layers.3.", "model.norm."))}
    comfy = {f"text_encoders.qwen3_4b.transformer.model.{name}": v for name, v in base.items()}
    for number, tensors in enumerate((state, base, cut, comfy)):
        file = made.save(tensors, tmp_path / f"{number}.safetensors")
        assert Pipeline.from_pretrained(tiny_folder, text_encoder=file).digest == whole.digest
    stored, wide = made.fp8(state)
    file = made.save(stored, tmp_path / "fp8.safetensors")
    found = Pipeline.from_pretrained(tiny_folder, text_encoder=file, dtype=torch.bfloat16).text_encoder.network
    expected = made.save(wide, tmp_path / "wide.safetensors")
    again = Pipeline.from_pretrained(tiny_folder, text_encoder=expected, dtype=torch.bfloat16).text_encoder.network
    assert same(found.state_dict(), again.state_dict())


def test_an_all_in_one_file_serves_every_part(tiny_folder: Path, tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{n}": v for n, v in made.original(tensors_of(tiny_folder / TRANSFORMER)).items()}
    tensors |= {f"vae.{n}": v for n, v in made.original_vae(tensors_of(tiny_folder / VAE)).items()}
    file = made.save(tensors, tmp_path / "all.safetensors")
    found = Pipeline.from_pretrained(tiny_folder, transformer=file, vae=file)
    assert found.digest == Pipeline.from_pretrained(tiny_folder).digest


# A pipeline in memory


# Bad input


def write_pickle(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path) + ".ran",)

    path.write_bytes(pickle.dumps(Bomb()))


def damaged(tensors: dict[str, torch.Tensor], path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    return made.save(tensors, path)


def set_nan(tensor: torch.Tensor, where: tuple[int, ...]) -> None:
    tensor[where] = float("nan")


QKV = "double_blocks.0.img_attn.qkv.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("single_blocks.0.linear2.weight"), "missing single_blocks.0.linear2.weight"),
    "missing first": (lambda t: t.pop("img_in.weight"), "missing img_in.weight; the file is incomplete"),
    "unexpected": (lambda t: t.update(more=torch.zeros(1)), "unexpected more"),
    "a hole in the blocks": (
        lambda t: t.update({"single_blocks.7.norm.query_norm.scale": torch.ones(128)}),
        "missing single_blocks.1.",
    ),
    "shape": (
        lambda t: t.update({QKV: torch.zeros(700, 256)}),
        r"double_blocks.0.img_attn.qkv.weight is \[700, 256\], the configuration asks for \[768, 256\]",
    ),
    "no heads": (
        lambda t: t.update({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(100)}),
        r"query_norm.scale is \[100\], but the hidden states are 256 wide",
    ),
    "axes": (lambda t: t.update({"img_in.weight": torch.zeros(3)}), r"img_in.weight is \[3\]; it needs 2 axes"),
    "nan in a norm": (
        lambda t: set_nan(t["single_blocks.0.norm.key_norm.scale"], (77,)),
        "single_blocks.0.norm.key_norm.scale holds values that are not",
    ),
    "nan in a matrix": (
        lambda t: set_nan(t[QKV], (slice(300, 301),)),
        f"{QKV} holds values that are not finite in bfloat16",
    ),
    "fp8 in squares of no size": (
        lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn), f"{QKV}_scale": torch.ones(5, 2)}),
        r"weight_scale is \[5, 2\]; allowed: one number, one for each of the 768 rows, or one for each square of 128 x 128",
    ),
    "fp8, some with scales": (
        lambda t: t.update(
            {
                QKV: t[QKV].to(torch.float8_e4m3fn),
                "single_blocks.0.linear2.weight": t["single_blocks.0.linear2.weight"].to(torch.float8_e4m3fn),
                "single_blocks.0.linear2.weight_scale": torch.ones(()),
            }
        ),
        rf"{QKV} is F8_E4M3 without a scale \(double_blocks.0.img_attn.qkv.weight_scale\), and the file has scales",
    ),
    "int8 without scales": (lambda t: t.update({QKV: t[QKV].to(torch.int8)}), f"{QKV} is I8 without a scale"),
    "a scale for nothing": (
        lambda t: t.update({f"{QKV}_scale": torch.ones(())}),
        f"{QKV} is BF16 and has a scale, double_blocks.0.img_attn.qkv.weight_scale",
    ),
    "packed fours": (lambda t: t.update({QKV: t[QKV].to(torch.uint8)}), f"{QKV} is U8 without a marker"),
    "of no dtype that is read": (lambda t: t.update({QKV: t[QKV].to(torch.int32)}), f"{QKV} is I32, which is not read"),
    "of FLUX.1": (
        lambda t: t.update({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}),
        "is of FLUX.1, whose blocks",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_damage(name: str, wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    file = damaged(made.original(wide_state), tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(file, dtype=None, device=CPU)
    assert str(file) in str(caught.value)


def test_refuses_files_that_are_no_weights(
    wide_state: dict[str, torch.Tensor], tiny_folder: Path, tmp_path: Path
) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            Pipeline.from_pretrained(tiny_folder, transformer=path)
        assert str(path) in str(caught.value)

    for name in ("model.ckpt", "model.pt", "model.safetensors"):  # under its own name and under another one
        write_pickle(tmp_path / name)
        refused(tmp_path / name, "is a pickle, which can run code")
        assert not (tmp_path / f"{name}.ran").exists()
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.safetensors")
    refused(tmp_path / "zip.safetensors", "is a pickle")
    whole = made.save(made.original(wide_state), tmp_path / "whole.safetensors")
    for size in (0, 5, 100, 5000, whole.stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:size])
        refused(tmp_path / "cut.safetensors", "is truncated or damaged")
    refused(tiny_folder / TEXT, "holds no transformer of a layout that is known, but a text_encoder")
    lora = made.save({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    refused(lora, "is a LoRA, not a model")
    refused(made.save({"some": torch.zeros(1)}, tmp_path / "other.safetensors"), "holds no transformer .* but some")
    tiny = made.save(made.original(tensors_of(tiny_folder / TRANSFORMER)), tmp_path / "tiny.safetensors")
    with pytest.raises(
        CheckpointError, match="have 16 dimensions, klein's 128; the file does not say how they are rotated"
    ):
        load_transformer(tiny, dtype=None, device=CPU)
    with pytest.raises(CheckpointError, match="autoencoder has 48 token channels, the transformer 16"):
        Pipeline.from_pretrained(transformer=whole)  # whole, and not of the bundled model
    text = made.save({f"model.{n}": torch.zeros(2, 2) for n in ("embed_tokens.weight",)}, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model.layers.0.self_attn.q_norm.weight"):
        Pipeline.from_pretrained(tiny_folder, text_encoder=text)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3])
def test_refuses_tricks_in_an_index(name: object, tiny_copy: Path) -> None:
    (tiny_copy / TRANSFORMER).rename(tiny_copy / "outside.safetensors")
    index = tiny_copy / "transformer" / f"{TRANSFORMER.name}.index.json"
    index.write_text(json.dumps({"weight_map": {"proj_out.weight": name}}))
    with pytest.raises(CheckpointError, match=r"index.json: names .*; shards have to be .safetensors files beside it"):
        Pipeline.from_pretrained(tiny_copy)


def test_headers_that_lie(wide_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A configuration inside a header is data: bad ones are refused, none is run."""
    tensors = made.original(wide_state)
    file = made.save(tensors, tmp_path / "a.safetensors", **{"limner.config": "{"})
    with pytest.raises(CheckpointError, match="limner.config in its header is not JSON"):
        open_part("transformer", file)
    values = json.dumps(KLEIN_4B.to_diffusers() | {"axes_dims_rope": [1, 2, 3]})
    file = made.save(tensors, tmp_path / "b.safetensors", **{"limner.config": values})
    with pytest.raises(CheckpointError, match="axes_dims_rope"):
        open_part("transformer", file)


class _Names(TensorFile):
    """A header alone."""

    def __init__(self, names: list[str]) -> None:
        self.path, self.files, self.headers = Path("header"), (), ()
        self.infos = {name: TensorInfo(dtype="BF16", shape=(4, 4), nbytes=32) for name in names}

    def read(self, name: str) -> torch.Tensor:
        raise NotImplementedError


def test_recognises_any_prefix_that_is_in_use() -> None:
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        layout = recognise(_Names([f"{prefix}single_stream_modulation.lin.weight", "else.weight"]), "transformer")
        assert (layout.prefix, layout.naming) == (prefix, "original")
    with pytest.raises(CheckpointError, match="holds no transformer"):
        recognise(_Names(["strange.single_stream_modulation.lin.weight"]), "transformer")
    with pytest.raises(CheckpointError, match="holds no vae of a layout that is known, but nothing"):
        recognise(_Names([]), "vae")
