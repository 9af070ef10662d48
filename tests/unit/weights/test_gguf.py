"""GGUF: every block format as diffusers widens it, whole transformers and text encoders, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.support import checkpoints as made
from tests.support.tiny import make_transformer

from limner import CheckpointError, Pipeline
from limner.weights.folder import load_transformer
from limner.weights.gguf import GgufFile
from limner.weights.names import gguf_text_names
from limner.weights.parts import open_part

CPU = torch.device("cpu")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A transformer whose rows are whole blocks of 256."""
    torch.manual_seed(3)
    network = make_transformer(128, text_width=256, double=1, single=1)
    return {name: value.bfloat16() for name, value in network.state_dict().items()}


def theirs(file: Path) -> dict[str, torch.Tensor]:
    """What diffusers makes of a GGUF file: its reader, its dequantization (asked for float32), its names."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions

    found = {}
    for name, value in load_gguf_checkpoint(str(file)).items():
        if isinstance(value, GGUFParameter):
            block, size = gguf.GGML_QUANT_SIZES[value.quant_type]
            blocks = value.as_tensor().detach().view(torch.uint8).reshape(-1, size)
            wide = dequantize_functions[value.quant_type](blocks, block, size, dtype=torch.float32)
            found[name] = wide.reshape(*value.quant_shape).float()
        else:
            found[name] = value.float()
    return convert_flux2_transformer_checkpoint_to_diffusers(found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_is_what_diffusers_makes_of_it(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = made.save_gguf(
        made.original(state).items(), tmp_path / "model.gguf", kind=kind, plain="F32" if "Q" in kind else kind
    )
    found = open_part("transformer", file)
    assert (found.layout.kind, found.layout.tensors["single_blocks.0.linear1.weight"].dtype) == ("gguf", kind)
    assert found.layout.tensors["single_blocks.0.linear1.weight"].shape == (2304, 256)
    expected = theirs(file)
    # the products of scales and quants are rounded in float32 in another order, the rest is exact
    tolerance = {"Q2_K": 3e-7, "Q3_K": 3e-7, "Q4_K": 3e-7, "Q5_K": 3e-7, "Q6_K": 3e-7}.get(kind, 0)
    wide = load_transformer(file, dtype=torch.float32, device=CPU).state_dict()
    assert wide.keys() == expected.keys()
    for name, value in expected.items():
        assert (wide[name] - value).abs().max() <= tolerance * value.abs().max(), name
    natural = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    loaded = load_transformer(file, dtype=None, device=CPU).state_dict()
    assert all(torch.equal(loaded[name], wide[name].to(natural)) for name in expected)


def test_q8_stays_near_the_weights(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = made.save_gguf(made.original(state).items(), tmp_path / "model.gguf", kind="Q8_0")
    for quantize, error in ((None, 0.01), ("int8", 0.02)):
        loaded = load_transformer(file, dtype=None, device=CPU, quantize=quantize).state_dict()
        name = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
        value = loaded[name].float()
        if quantize:
            assert loaded[name].dtype == torch.int8
            value *= loaded[f"{name}_scale"][:, None]
        assert 0 < (value - state[name].float()).norm() < error * state[name].float().norm()


def test_rows_are_read_alone(state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a fused projection, and a matrix in several steps, are those of the whole."""
    file = GgufFile(made.save_gguf(made.original(state).items(), tmp_path / "model.gguf", kind="Q4_K"))
    name = "double_blocks.0.img_attn.qkv.weight"
    whole = file.read(name)
    monkeypatch.setattr("limner.weights.gguf.VALUES_AT_ONCE", 256 * 7)
    assert torch.equal(file.read(name), whole)
    assert torch.equal(file.read_as(name, torch.bfloat16, slice(256, 512)), whole[256:512].bfloat16())


def test_a_text_encoder(tiny_folder: Path, tmp_path: Path) -> None:
    """Under the names that transformers and the package have for this architecture."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    tensors = made.tensors_of(tiny_folder / made.TEXT)
    with torch.device("meta"):
        network = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tiny_folder / "text_encoder"))
    names = get_gguf_hf_weights_map(network, TensorProcessor(), model_type="qwen3", num_layers=4)
    stored = {name: tensors[theirs] for name, theirs in names.items() if theirs in tensors}
    assert "blk.3.attn_q_norm.weight" in stored
    file = made.save_gguf(stored.items(), tmp_path / "text.gguf", kind="F32", architecture="qwen3")
    whole = Pipeline.from_pretrained(tiny_folder)
    assert Pipeline.from_pretrained(tiny_folder, text_encoder=file).digest == whole.digest
    other = made.save_gguf(stored.items(), tmp_path / "other.gguf", kind="F32", architecture="llama")
    with pytest.raises(
        CheckpointError, match="general.architecture='llama' is not that of a text_encoder.*allowed: qwen3"
    ):
        Pipeline.from_pretrained(tiny_folder, text_encoder=other)
    with pytest.raises(CheckpointError, match="is GGUF, in which a vae is not read"):
        Pipeline.from_pretrained(tiny_folder, vae=file)


HEADER: dict[str, object] = {
    "qwen3.block_count": 4,
    "qwen3.embedding_length": 16,
    "qwen3.attention.head_count": 2,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-5,
    "qwen3.rope.freq_base": 5e5,
    "qwen3.context_length": 512,
}


def text_file(folder: Path, path: Path, **changes: object) -> Path:
    """The text encoder of a folder with hyperparameters in its header; None leaves one out."""
    tensors = made.tensors_of(folder / made.TEXT)
    names = {
        f"model.{rule.target}": rule.source
        for rule in (gguf_text_names().rule(n.removeprefix("model.")) for n in tensors)
    }
    names["lm_head.weight"] = "output.weight"
    stored = {names[name]: value for name, value in tensors.items()}
    said = {key: value for key, value in (HEADER | changes).items() if value is not None}
    return made.save_gguf(stored.items(), path, kind="F32", architecture="qwen3", header=said)


def test_the_header_of_a_text_encoder(tiny_folder: Path, tiny_copy: Path, tmp_path: Path) -> None:
    """What it says comes before the model's configuration: the same as a folder whose configuration says it."""
    file = text_file(tiny_folder, tmp_path / "text.gguf")
    config = tiny_copy / "text_encoder" / "config.json"
    before = json.loads(config.read_text())
    said = before | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config.write_text(json.dumps(said))
    whole = Pipeline.from_pretrained(tiny_folder)
    ours, theirs = (Pipeline.from_pretrained(tiny_folder, text_encoder=x) for x in (file, tiny_copy / "text_encoder"))
    assert torch.equal(made.draw(ours), made.draw(theirs))
    assert not torch.equal(made.draw(ours), made.draw(whole))
    assert ours.text_encoder.network.config.rms_norm_eps == 1e-5
    alone = open_part("text_encoder", file).config  # no configuration of this size is known: the header says all
    assert (alone["num_hidden_layers"], alone["rope_parameters"]["rope_theta"]) == (4, 5e5)
    bare = open_part("text_encoder", text_file(tiny_folder, tmp_path / "b.gguf", **dict.fromkeys(HEADER)), like=config)
    assert bare.config == said  # a header without hyperparameters changes nothing


def test_positions_that_are_stretched(tiny_folder: Path, tmp_path: Path) -> None:
    yarn = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 128,
    }
    found = open_part("text_encoder", text_file(tiny_folder, tmp_path / "yarn.gguf", **yarn)).config
    assert found["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    pipe = Pipeline.from_pretrained(tiny_folder, text_encoder=tmp_path / "yarn.gguf")
    assert pipe.text_encoder.network.rotary_emb.attention_scaling > 1.1  # 0.1 ln 4 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen3.attention.head_count": 4}, "its header says num_attention_heads=4, its tensors are those of 2"),
        (
            {"qwen3.rope.scaling.type": "longrope"},
            "qwen3.rope.scaling.type='longrope' in its header is not read; allowed: 'none'",
        ),
        (
            {"qwen3.rope.freq_base": -1.0},
            "qwen3.rope.freq_base=-1.0 in its header is not read; allowed: a number over 0",
        ),
        ({"qwen3.attention.causal": False}, "qwen3.attention.causal=False in its header is not read; allowed: True"),
        ({"qwen3.attention.sliding_window": 128}, "qwen3.attention.sliding_window=128"),
        ({"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}, "original_context_length=None"),
    ],
)
def test_refuses_headers_that_are_not_read(
    changes: dict[str, object], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_part("text_encoder", text_file(tiny_folder, tmp_path / "text.gguf", **changes))
    assert "\n" not in str(caught.value)


def test_refuses_other_architectures(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tensors = made.original(state)
    for name, architecture, message in (
        ("a", "sd3", "general.architecture='sd3' is not that of a transformer.*allowed: flux"),
        ("b", "llama", "general.architecture='llama' is not"),
    ):
        file = made.save_gguf(tensors.items(), tmp_path / f"{name}.gguf", kind="F16", architecture=architecture)
        with pytest.raises(CheckpointError, match=message):
            open_part("transformer", file)
    flux1 = tensors | {"double_blocks.0.img_mod.lin.weight": torch.zeros(256, 256)}
    with pytest.raises(CheckpointError, match="is of FLUX.1"):
        open_part("transformer", made.save_gguf(flux1.items(), tmp_path / "c.gguf", kind="Q8_0"))


def test_refuses_formats_that_are_not_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    data: np.ndarray[Any, Any] = np.zeros((4, 54), dtype=np.uint8)
    writer.add_tensor("img_in.weight", data, raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="img_in.weight is TQ1_0; allowed: F32, F16, BF16, "):
        GgufFile(tmp_path / "a.gguf")


def test_refuses_damage(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Cut anywhere, and with a count in its header that no file could hold: an error, at once."""
    whole = made.save_gguf(made.original(state).items(), tmp_path / "whole.gguf", kind="Q8_0").read_bytes()
    file = tmp_path / "cut.gguf"
    for size in (0, 3, 10, 20, 30, 200, 1000, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut.gguf: cannot be read as GGUF .*truncated or damaged"):
            GgufFile(file)
    for at in (8, 16):  # the numbers of tensors and of fields
        file.write_bytes(whole[:at] + (2**62).to_bytes(8, "little") + whole[at + 8 :])
        with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
            GgufFile(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, the file at \d+\); it is truncated"):
        GgufFile(file)
    file.write_bytes(b"GGUX" + whole[4:])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        load_transformer(file, dtype=None, device=CPU)


def test_a_count_that_no_file_could_hold(tmp_path: Path) -> None:
    """The package reads what lies past the end as empty, and would count to the end."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_array("some.array", [7, 7, 7])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "a.gguf").read_bytes()
    at = data.index(b"some.array") + len(b"some.array") + 8  # after the types of field and items
    assert data[at : at + 8] == (3).to_bytes(8, "little")
    (tmp_path / "a.gguf").write_bytes(data[:at] + (100_000).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(CheckpointError, match="a header or tensor ends at byte"):
        GgufFile(tmp_path / "a.gguf")


def test_names_the_tensor_that_is_not_finite(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tensors = made.original(state)
    tensors["single_blocks.0.norm.key_norm.scale"] = torch.full((128,), float("inf"))
    file = made.save_gguf(tensors.items(), tmp_path / "a.gguf", kind="Q8_0")
    with pytest.raises(CheckpointError, match="single_blocks.0.norm.key_norm.scale holds values that are not finite"):
        load_transformer(file, dtype=None, device=CPU)
