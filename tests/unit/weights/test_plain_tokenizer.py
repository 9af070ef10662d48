"""A plain tokenizer is transformers' of the same folder; other folders are for transformers."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.weights.test_tokenizer import LIKE_QWEN3

from limner import CheckpointError, Flux2KleinKVPipeline
from limner.model.text_encoder import TextEncoder
from limner.weights.folder import bundled_model
from limner.weights.plain_tokenizer import PlainTokenizer, transformers_tokenizer
from limner.weights.tokenizer import load_tokenizer

PROMPTS = (
    "",
    "a cat",
    "  two  spaces\n\nand lines\r\n\tit's 1234 o'clock, I'LL",
    "日本語とe\u0301 \u00e9 \ufb01 😀",
    "<|im_end|>\n<|im_start|>assistant\n<think>",
    "</think> x <|endoftext|>y <|unknown|>",
    "{{ messages }} {% raw %} <b>&amp;</b>",
    "long " * 40,
)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A folder with the files and settings of Qwen3's tokenizer as klein has it, and the bundled vocabulary."""
    folder = tmp_path / "tokenizer"
    made = json.loads((bundled_model() / "tokenizer" / "tokenizer.json").read_text())
    for token in made["added_tokens"][3:]:
        token["special"] = False
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    made |= {"post_processor": byte_level, "decoder": byte_level}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in made["added_tokens"]}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": LIKE_QWEN3,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, made["model"]["merges"])))
    return folder


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    assert (found.eos_token, found.model_max_length) == (expected.eos_token, expected.model_max_length)
    ours, theirs = (TextEncoder(torch.nn.Identity(), one, out_layers=(1,)) for one in (found, expected))
    for prompt in PROMPTS:
        for length in (8, 64):
            a, b = (encoder.tokenize(prompt, max_sequence_length=length) for encoder in (ours, theirs))
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.mask, b.mask)
            assert a.ids.dtype == b.ids.dtype
            assert (a.num_tokens, a.cut) == (b.num_tokens, b.cut)


def test_the_bundled_and_saved_tokenizers_are_transformers(tiny_folder: Path) -> None:
    for folder in (bundled_model() / "tokenizer", tiny_folder / "tokenizer"):
        found = load_tokenizer(folder)
        assert isinstance(found, PlainTokenizer)
        assert_same(found, transformers_tokenizer(folder))
    again = pickle.loads(pickle.dumps(copy.deepcopy(found)))
    assert again("a cat", truncation=False) == found("a cat", truncation=False)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_kleins_tokenizer_is_transformers(qwen: Path, padding_side: str) -> None:
    change(qwen / "tokenizer_config.json", lambda config: config | {"padding_side": padding_side})
    found = load_tokenizer(qwen)
    assert isinstance(found, PlainTokenizer)
    assert_same(found, transformers_tokenizer(qwen))


def change(file: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def one_more(made: dict[str, Any]) -> dict[str, Any]:
    last = made["added_tokens"][-1]
    return made | {"added_tokens": [*made["added_tokens"][:-1], last | {"lstrip": True}]}


UNUSUAL: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "the file's own parts": ("tokenizer_config.json", lambda c: c | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "a token that only the settings have": ("tokenizer_config.json", lambda c: c | {"bos_token": "<start>"}),
    "extra tokens": ("tokenizer_config.json", lambda c: c | {"extra_special_tokens": ["<more>"]}),
    "spaces in front": ("tokenizer_config.json", lambda c: c | {"add_prefix_space": True}),
    "cut on the left": ("tokenizer_config.json", lambda c: c | {"truncation_side": "left"}),
    "cleaned text": ("tokenizer_config.json", lambda c: c | {"clean_up_tokenization_spaces": True}),
    "other added tokens": ("tokenizer_config.json", lambda c: c | {"added_tokens_decoder": {}}),
    "tokens in older files": ("tokenizer_config.json", lambda c: without(c, "added_tokens_decoder")),
    "a key that is not known": ("tokenizer_config.json", lambda c: c | {"sep_token": "<|im_end|>"}),
    "private names": ("tokenizer_config.json", lambda c: c | {"chat_template": "{% set ns = namespace(_a=1) %}"}),
    "digits in threes": ("tokenizer.json", lambda t: t | {"pre_tokenizer": t["pre_tokenizer"]["pretokenizers"][1]}),
    "no normal form": ("tokenizer.json", lambda t: t | {"normalizer": None}),
    "tokens around the text": (
        "tokenizer.json",
        lambda t: (
            t | {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}}
        ),
    ),
    "unknown bytes": ("tokenizer.json", lambda t: t | {"model": t["model"] | {"unk_token": "<|endoftext|>"}}),
    "tokens that take spaces": ("tokenizer.json", one_more),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_plain_is_for_transformers(qwen: Path, name: str) -> None:
    file, edit = UNUSUAL[name]
    change(qwen / file, edit)
    with contextlib.suppress(CheckpointError):  # transformers may refuse it
        assert not isinstance(load_tokenizer(qwen), PlainTokenizer)


def test_more_files_are_for_transformers(qwen: Path) -> None:
    (qwen / "config.json").write_text('{"model_type": "qwen2"}')
    assert not isinstance(load_tokenizer(qwen), PlainTokenizer)


def test_users_get_transformers_tokenizer_and_prompts_follow_it(tiny_folder: Path) -> None:
    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_folder)
    before = pipe.text_encoder.tokenize("a cat", max_sequence_length=32)
    assert isinstance(pipe.text_encoder.tokenizer, PlainTokenizer)
    assert pipe.tokenizer.vocab_size > 0
    assert pipe.tokenizer is pipe.text_encoder.tokenizer
    after = pipe.text_encoder.tokenize("a cat", max_sequence_length=32)
    assert torch.equal(before.ids, after.ids)
    pipe.tokenizer.chat_template = "{{ messages[0].content }}"
    assert pipe.text_encoder.tokenize("a cat", max_sequence_length=32).num_tokens < before.num_tokens
