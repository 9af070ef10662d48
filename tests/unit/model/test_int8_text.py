"""A text encoder in int8: its hidden states, its folder, copies, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.native import has_tiles, without_tiles
from tests.support.tiny import generators, picture, relative_error

from limner import CheckpointError, Flux2KleinKVPipeline, InvalidRequest, Pipeline
from limner.cli import main
from limner.deploy.options import DeployOptions
from limner.engine.load import load_pipeline
from limner.memory.pages import file_backed
from limner.model import int8
from limner.model.int8 import Int8Linear, quantize_layers
from limner.model.qwen3 import Qwen3
from limner.model.text_encoder import TextEncoder, TokenizedPrompt
from limner.options import ModelOptions
from limner.weights.convert import convert
from limner.weights.networks import empty_text_network

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
WEIGHTS = Path("text_encoder", "model.safetensors")
ARGUMENTS: dict[str, Any] = {"prompt": "a dog", "output_type": "pt", "width": 64, "height": 64}


def random_network(config: dict[str, Any], dtype: torch.dtype) -> Any:
    network = empty_text_network(config, used=4, depth=4, where="test").to_empty(device="cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=p.shape[1] ** -0.5) if p.dim() == 2 else p.uniform_(0.5, 1.5)
        network.embed_tokens.weight.normal_()
    return network.to(dtype).requires_grad_(False).eval()


def encoder_of(network: Any) -> TextEncoder:
    made = TextEncoder(network, None, out_layers=(1, 2, 3))
    made.rebuild_rotary()
    return made


def prompt(length: int, size: int = 24) -> TokenizedPrompt:
    mask = torch.tensor([1] * length + [0] * (size - length))
    return TokenizedPrompt(ids=torch.randint(64, (size,)) * mask, mask=mask, num_tokens=length, cut="")


def drawn(pipe: Pipeline) -> torch.Tensor:
    images: torch.Tensor = pipe(**ARGUMENTS, image=picture(64, 64), generator=generators(1)[0]).images
    return images


@pytest.fixture(scope="module")
def int8_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with transformer and text encoder in int8, as `limner quantize --quantize-text` writes it."""
    folder = tmp_path_factory.mktemp("int8") / "model"
    assert main(["quantize", str(tiny_folder), "-o", str(folder), "--quantize-text"]) == 0
    return folder


@pytest.mark.parametrize("products", [pytest.param("tiles", marks=has_tiles), "oneDNN", "widened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_hidden_states(dtype: torch.dtype, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near those of float32, and to the bit those of transformers' class with the same int8 matrices.

    That class quantizes activations before each matrix, ours once for those with the same input.
    """
    from transformers import Qwen3Config, Qwen3Model

    instructions = products != "widened"
    if instructions and not int8.has_int8_products():
        pytest.skip("this CPU has no int8 dot products")
    monkeypatch.setattr(int8, "has_int8_products", lambda: instructions)
    if products == "oneDNN":
        without_tiles(monkeypatch)
    exact, ours = random_network(CONFIG, torch.float32), random_network(CONFIG, dtype)
    with torch.device("meta"):
        theirs = Qwen3Model(Qwen3Config.from_dict(dict(CONFIG)))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    for network in (ours, theirs):
        quantize_layers(network)
        assert sum(isinstance(module, Int8Linear) for module in network.modules()) == 4 * 7
    assert isinstance(ours, Qwen3)
    assert ours.embed_tokens.weight.dtype == dtype
    found, same, expected = (encoder_of(network) for network in (ours, theirs, exact))
    assert (found.quantization, expected.quantization) == ("int8", None)
    for prompts in ([prompt(24)], [prompt(7)], [prompt(24), prompt(3)]):
        states = found(prompts)
        assert states.dtype == dtype
        assert torch.equal(states, same(prompts))
        assert 0 < relative_error(states, expected(prompts)) < 4e-2
    copies = [m.packed_bytes for m in ours.modules() if isinstance(m, Int8Linear)]
    assert all(copies) if products == "oneDNN" else not any(copies)


def test_activations_that_several_matrices_read_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if not int8.has_int8_products():
        pytest.skip("this CPU has no int8 dot products")
    network, calls = random_network(CONFIG, torch.float32), []
    quantize_layers(network)
    monkeypatch.setattr(int8, "quantize_rows", lambda x, made=int8.quantize_rows: calls.append(1) or made(x))
    encoder_of(network)([prompt(24)])
    assert len(calls) == 4 * 4  # for q, k and v; o; gate and up; down


def test_the_folder_is_the_quantized_model(tiny_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    made, read = (
        Pipeline.from_pretrained(tiny_folder, quantize="int8", quantize_text=True),
        Pipeline.from_pretrained(int8_folder),
    )
    plain = Pipeline.from_pretrained(tiny_folder, quantize="int8")
    assert made.text_encoder.quantization == read.text_encoder.quantization == "int8"
    assert made.formats.quantize_text
    assert plain.text_encoder.quantization is None
    assert torch.equal(drawn(made), drawn(read))
    assert not torch.equal(drawn(made), drawn(plain))
    assert made.digest == read.digest != plain.digest
    assert made.reference_weights == plain.reference_weights  # K/V do not depend on the text encoder
    alone = Pipeline.from_pretrained(tiny_folder, quantize_text=True)
    assert (alone.formats.quantize, alone.formats.quantize_text) == (None, True)
    config = json.loads((int8_folder / "text_encoder" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "limner_int8"}
    stored = load_file(int8_folder / WEIGHTS)
    assert stored["model.layers.3.mlp.up_proj.weight"].dtype == torch.int8  # a layer that no call reads
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    narrow = Pipeline.from_pretrained(int8_folder, dtype=torch.bfloat16).text_encoder
    assert narrow.dtype == torch.bfloat16
    assert {m.weight_scale.dtype for m in narrow.modules() if isinstance(m, Int8Linear)} == {torch.float32}


def test_the_option_reaches_every_loader(tiny_folder: Path, tmp_path: Path) -> None:
    options = ModelOptions(model=str(tiny_folder), quantize_text=True)
    assert load_pipeline(options).text_encoder.quantization == "int8"
    assert load_pipeline(ModelOptions(model=str(tiny_folder))).text_encoder.quantization is None
    deployed = DeployOptions.parse({"model": str(tiny_folder), "quantize_text": "true"})
    assert deployed.model_options() == options
    words = ["generate", "a dog", "--size", "64x64", "--seed", "1", "--model", str(tiny_folder)]
    files = [tmp_path / "wide.png", tmp_path / "narrow.png"]
    for file, more in zip(files, ([], ["--quantize-text"]), strict=True):
        assert main([*words, "-o", str(file), *more]) == 0
    assert files[0].read_bytes() != files[1].read_bytes()


def test_its_weights_are_mapped(int8_folder: Path) -> None:
    """They are those of the file, not copies."""
    pipe = Pipeline.from_pretrained(int8_folder)
    weights = [module.weight for module in pipe.text_encoder.modules() if isinstance(module, Int8Linear)]
    assert len(file_backed(weights)) == len(weights) > 0
    limited = Pipeline.from_pretrained(int8_folder, memory_limit="1TiB")
    assert limited.formats.anonymous == frozenset()


def test_inspect_and_convert(
    tiny_folder: Path, int8_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = int8_folder / "text_encoder"
    assert main(["inspect", str(part), "--verify", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["parts"]
    assert (found["layout"], found["missing"], found["unexpected"]) == ("int8", [], [])
    pipe = Pipeline.from_pretrained(int8_folder)
    assert found["weights"] == pipe._digests.of(pipe.text_encoder)
    # the part alone, to int8 and back: back are the values that int8 stands for
    words = ["convert", str(tiny_folder / "text_encoder"), "-o", str(tmp_path / "narrow"), "--to", "int8"]
    assert main(words) == 0
    assert (tmp_path / "narrow" / WEIGHTS.name).read_bytes() == (int8_folder / WEIGHTS).read_bytes()
    assert main(["convert", str(part), "-o", str(tmp_path / "wide"), "--to", "diffusers"]) == 0
    wide, narrow = load_file(tmp_path / "wide" / WEIGHTS.name), load_file(int8_folder / WEIGHTS)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(wide[name], narrow[name].float() * narrow[f"{name}_scale"][:, None])
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    assert Pipeline.from_pretrained(tiny_folder, text_encoder=tmp_path / "wide").text_encoder.quantization is None
    with pytest.raises(InvalidRequest, match="quantize_text: is for the layout int8, not for original"):
        convert(tiny_folder, tmp_path / "x", to="original", quantize_text=True)


def test_a_file_alone_and_shards(tiny_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    expected = Pipeline.from_pretrained(int8_folder)
    single = Pipeline.from_pretrained(int8_folder, text_encoder=int8_folder / WEIGHTS)
    assert single.digest == expected.digest
    folder = Path(shutil.copytree(int8_folder, tmp_path / "sharded"))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"model-0000{1 + name.endswith('_scale')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        some = {name: value for name, value in tensors.items() if files[name] == file}
        save_file(some, folder / "text_encoder" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Pipeline.from_pretrained(folder).digest == expected.digest


def test_other_formats_become_int8_while_they_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    """Half precision is widened before it is quantized, and a model is cast before, as without int8."""
    half = tmp_path / "half"
    convert(tiny_folder, half, to="diffusers", dtype=torch.bfloat16)
    made = Pipeline.from_pretrained(half, quantize_text=True)
    cast = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16, quantize_text=True)
    assert made.digest == cast.digest


def test_saved_by_the_drop_in(tiny_folder: Path, int8_folder: Path, tmp_path: Path) -> None:
    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_folder, quantize_text=True)
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (int8_folder / WEIGHTS).read_bytes()
    assert Pipeline.from_pretrained(tmp_path / "saved").digest == pipe.digest
    again = Flux2KleinKVPipeline.from_pretrained(int8_folder)
    again.save_pretrained(tmp_path / "again")
    assert Pipeline.from_pretrained(tmp_path / "again").digest == again.digest


def test_copies(int8_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(int8_folder)
    expected = drawn(pipe)
    for made in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert made.text_encoder.quantization == "int8"
        assert torch.equal(drawn(made), expected)


def test_a_changed_matrix_is_seen(int8_folder: Path) -> None:
    """Tokens of prompts are kept: not beyond a change of the weights that made them."""
    pipe = Pipeline.from_pretrained(int8_folder)
    before, digest = drawn(pipe), pipe.digest
    with torch.no_grad():
        pipe.text_encoder.network.layers[0].mlp.up_proj.weight_scale.mul_(2)
    assert not torch.equal(drawn(pipe), before)
    assert pipe.digest != digest


def test_refused(int8_folder: Path, tiny_copy: Path, tmp_path: Path) -> None:
    config_file = tiny_copy / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "limner_int8"}}))
    with pytest.raises(CheckpointError, match="text_encoder: config.json says int8, the weights are not"):
        Pipeline.from_pretrained(tiny_copy)
    config_file.write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(CheckpointError, match="self_attn.q_proj has a bias; .* without quantize_text"):
        Pipeline.from_pretrained(tiny_copy, quantize_text=True)
    folder = Path(shutil.copytree(int8_folder, tmp_path / "mixed"))
    tensors, name = load_file(folder / WEIGHTS), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale")[:, None]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is not int8, others are; quantize the model again"):
        Pipeline.from_pretrained(folder)


def test_windows_and_stretched_rotation_are_quantized_too(tiny_copy: Path) -> None:
    """They are computed by transformers' class."""
    from transformers import Qwen3Model

    config_file = tiny_copy / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text()) | {"use_sliding_window": True, "sliding_window": 8}
    config_file.write_text(json.dumps(config | {"max_window_layers": 1}))
    pipe, wide = Pipeline.from_pretrained(tiny_copy, quantize_text=True), Pipeline.from_pretrained(tiny_copy)
    assert isinstance(pipe.text_encoder.network, Qwen3Model)
    assert pipe.text_encoder.quantization == "int8"
    found, expected = (
        one.text_encoder([one.text_encoder.tokenize("a dog", max_sequence_length=16)]) for one in (pipe, wide)
    )
    assert 0 < relative_error(found, expected) < 6e-2
