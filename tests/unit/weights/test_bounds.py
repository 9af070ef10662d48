"""Hostile model folders: nothing in them is run, built without bounds, or waited for."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from limner import CheckpointError, Flux2KleinKVPipeline, Pipeline
from limner.config import KLEIN_4B, KLEIN_9B, QWEN3_4B, QWEN3_8B, TransformerConfig
from limner.weights.bounds import check_json, check_text_encoder, check_transformer
from limner.weights.files import read_json
from limner.weights.folder import bundled_model
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer

FILES = (
    "model_index.json",
    "limner.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/config.json",
    "tokenizer/special_tokens_map.json",
)
CODE: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoTokenizer": ["evil.Tok", "evil.Tok"], "AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
    ("auto_map", ["evil.Tok", None]),
    ("_attn_implementation", "someone/kernels"),
    ("attn_implementation", {"": "someone/kernels:function"}),
    ("attn_implementation", "flash_attention_3"),
    ("_attn_implementation_internal", "someone/kernels"),
    ("experts_implementation", "someone/kernels"),
    ("use_kernels", True),
    ("kernel_config", {"RMSNorm": "someone/kernels:RMSNorm"}),
    ("custom_pipeline", "evil.py"),
    ("trust_remote_code", True),
)


def edit_json(path: Path, **changes: object) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("stdin was asked"))


@pytest.mark.parametrize("file", FILES)
def test_keys_that_name_code_are_refused_everywhere(file: str, tiny_copy: Path) -> None:
    (tiny_copy / Path(file).parent / "evil.py").write_text("raise SystemExit('code of the folder ran')\n")
    edit_json(tiny_copy / file, auto_map=CODE[0][1])
    with pytest.raises(CheckpointError, match=r"auto_map=.* names code to run") as caught:
        Pipeline.from_pretrained(tiny_copy)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), CODE, ids=lambda value: str(value)[:30])
def test_every_such_key_is_refused_however_deep(key: str, value: object, tmp_path: Path) -> None:
    for config in ({key: value}, {"a": [{"b": {key: value}}]}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"{key}=.* names code to run"):
            read_json(tmp_path / "config.json")


def test_keys_that_name_no_code_are_read() -> None:
    harmless: list[dict[str, object]] = [
        {"auto_map": None, "auto_mapping": None, "use_kernels": False, "attn_implementation": "sdpa"},
        {"_attn_implementation": None, "_attn_implementation_autoset": True, "kernel_size": 3},
        {
            "auto_mapping": {
                "base_model_class": "Flux2Transformer2DModel",
                "parent_library": "diffusers.models.transformers",
            }
        },
    ]
    for config in harmless:
        check_json(config, where="config.json")


def test_the_library_is_told_to_run_no_code(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    load = transformers.AutoTokenizer.from_pretrained

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return load(*args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy)
    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    assert not asked  # its tokenizer is read without
    assert pipe.tokenizer.eos_token
    assert [options["trust_remote_code"] for options in asked] == [False]


SIZES: tuple[tuple[str, str, Any], ...] = (
    ("transformer", "num_layers", 10**9),
    ("transformer", "num_single_layers", 10**9),
    ("transformer", "num_attention_heads", 10**9),
    ("transformer", "attention_head_dim", -16),
    ("transformer", "joint_attention_dim", 10**12),
    ("transformer", "timestep_guidance_channels", 10**12),
    ("transformer", "mlp_ratio", 1e300),
    ("transformer", "mlp_ratio", float("nan")),
    ("transformer", "eps", float("inf")),
    ("vae", "layers_per_block", 10**7),
    ("vae", "block_out_channels", [8] * 1000),
    ("vae", "block_out_channels", [8, 8, 8, 10**12]),
    ("vae", "latent_channels", 10**12),
    ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "hidden_size", 10**12),
    ("text_encoder", "vocab_size", 10**12),
    ("text_encoder", "num_labels", 10**9),
    ("text_encoder", "max_position_embeddings", 10**12),
)


@pytest.mark.parametrize(("part", "key", "value"), SIZES, ids=lambda value: str(value)[:20])
def test_sizes_that_no_network_has_are_refused_before_building(
    part: str, key: str, value: object, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(tiny_copy / part / "config.json", **{key: value})
    config = read_json(tiny_copy / part / "config.json")
    build = {
        "transformer": lambda: empty_transformer(TransformerConfig.from_diffusers(config), int8=False, where=part),
        "vae": lambda: empty_autoencoder(config, where=part),
        "text_encoder": lambda: empty_text_network(config, used=3, depth=4, where=part),
    }[part]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "device", lambda *_: pytest.fail("the network was built"))
        with pytest.raises(CheckpointError) as caught:
            build()
    assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError):
        Pipeline.from_pretrained(tiny_copy)


def test_the_models_of_the_family_are_within_the_limits() -> None:
    for transformer in (KLEIN_4B, KLEIN_9B):
        check_transformer(transformer, where="klein")
    for text in (QWEN3_4B, QWEN3_8B):
        check_text_encoder(text, where="klein")
    for part in ("transformer", "vae", "text_encoder"):
        read_json(bundled_model() / part / "config.json")


@pytest.mark.parametrize(
    "file",
    [
        *(file for file in FILES if "special" not in file),
        "tokenizer/tokenizer.json",
        "tokenizer/added_tokens.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_pipes_are_not_waited_for(file: str, tiny_copy: Path) -> None:
    (tiny_copy / file).unlink(missing_ok=True)
    os.mkfifo(tiny_copy / file)
    with pytest.raises(CheckpointError):
        Pipeline.from_pretrained(tiny_copy)


@pytest.mark.parametrize("file", ["limner.json", "tokenizer/tokenizer_config.json", "vae/config.json"])
def test_deep_and_long_json_is_refused(file: str, tiny_copy: Path) -> None:
    for text, problem in (
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 32 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not JSON"),
        ('{"a": "' + "x" * (5 << 20) + '"}', "has over 4194304 bytes"),
    ):
        (tiny_copy / file).write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            Pipeline.from_pretrained(tiny_copy)
