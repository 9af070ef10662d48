"""Tokenizers of model folders are data: their templates cannot run or grow without bounds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from limner import CheckpointError
from limner.model.text_encoder import TextEncoder
from limner.weights.folder import bundled_model
from limner.weights.tokenizer import check_template, load_tokenizer
from limner.weights.tokenizer_file import check_tokenizer

LIKE_QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.arguments | tojson }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

HOSTILE = {
    "loops inside each other": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over the prompt": "{% for a in messages[0].content %}{% for b in messages[0].content %}x{% endfor %}{% endfor %}",
    "a prompt called messages": "{% set messages = messages[0].content %}{% for a in messages %}x{% endfor %}",
    "a prompt called tools": "{% set ns = namespace(tools=messages[0].content) %}{% for a in ns.tools %}x{% endfor %}",
    "tool_calls set": "{% set ns.tool_calls = messages[0].content %}{% for a in ns.tool_calls %}x{% endfor %}",
    "a loop's own target": "{% for messages in messages %}{% for a in messages %}x{% endfor %}{% endfor %}",
    "doubling": "{% set a = 'x' %}" + "{% set a = a ~ a %}" * 50 + "{{ a }}",
    "doubling by +": "{% set a = 'x' %}" + "{% set a = a + a %}" * 50 + "{{ a }}",
    "doubling by lists": "{% set a = 'x' %}" + "{% set a = [a, a] %}" * 50 + "{{ a }}",
    "doubling by JSON": "{% set a = messages[0].content %}" + "{% set a = a|tojson %}" * 50 + "{{ a }}",
    "JSON of JSON": "{{ messages[0].content" + "|tojson" * 50 + " }}",
    "lists written as text": "{% set a = messages[0].content %}" + "{% set a = a.split('a')|trim %}" * 50 + "{{ a }}",
    "the same in one value": "{{ " + "(" * 30 + "a" + ".split('a') ~ '')" * 30 + " }}",
    "the same by filters": "{{ " + "(" * 30 + "a" + ".split('a')|trim)" * 30 + " }}",
    "lists of characters": "{{ a|list|string }}",
    "a block that is kept": "{% set a %}{{ a }}{{ a }}{% endset %}",
    "macros": "{% macro a() %}{{ b() }}{{ b() }}{% endmacro %}{{ a() }}",
    "recursive loop": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "repetition": "{{ 'x' * 10000000000 }}",
    "powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "padding": "{{ 'x'|center(10000000000) }}",
    "formatting": "{{ '%10000000000d' % 1 }}",
    "the format method": "{{ '{:10000000000}'.format(1) }}",
    "joins": "{{ messages[0].content|join(messages[0].content) }}",
    "include": "{% include 'other' %}",
    "attributes": "{{ ''.__class__.__mro__() }}",
    "too long": "x" * 40_000,
    "too many parts": "{{ a.b }}" * 3_000,
    "nested parentheses": "{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}",
    "no Jinja": "{% if %}",
    "no text": 5,
}


def test_the_usual_templates_are_allowed() -> None:
    check_template(LIKE_QWEN3, where="tokenizer")
    check_template((bundled_model() / "tokenizer" / "chat_template.jinja").read_text(), where="tokenizer")


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_that_run_or_grow_without_bounds_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="chat template") as caught:
        check_template(HOSTILE[name], where="tokenizer")
    assert "\n" not in str(caught.value)


def test_a_hostile_template_is_refused_when_the_model_is_loaded(tiny_copy: Path) -> None:
    folder = tiny_copy / "tokenizer"
    (folder / "chat_template.jinja").write_text(HOSTILE["loops inside each other"])
    with pytest.raises(CheckpointError, match="a loop over anything else than messages"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": HOSTILE["powers"]}))
    with pytest.raises(CheckpointError, match="uses Pow"):
        load_tokenizer(folder)


def test_other_tokenizers_and_piles_of_files_are_refused(tiny_copy: Path) -> None:
    folder = tiny_copy / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "RagTokenizer"}))
    with pytest.raises(
        CheckpointError, match="tokenizer_class='RagTokenizer' is not supported; allowed: Qwen2Tokenizer"
    ):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with (folder / "merges.txt").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="has 1073741824 bytes"):
        load_tokenizer(folder)
    (folder / "merges.txt").unlink()
    for i in range(200):
        (folder / f"{i}.txt").touch()
    with pytest.raises(CheckpointError, match="a tokenizer has at most 100"):
        load_tokenizer(folder)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PIECES = [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern that takes exponential time": (
        {"pre_tokenizer": split("(a|aa)+$")},
        r"regular expression '\(a\|aa\)\+\$'",
    ),
    "one inside a sequence": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES, split("(.*)*x")]}},
        "pre_tokenizer has the regular expression",
    ),
    "one that replaces": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "c"}},
        "normalizer has a step 'Replace'; allowed: Sequence, NFC",
    ),
    "steps that each double the text": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 10}},
        "ByteLevel more than once",
    ),
    "many steps": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}] * 100}}, "has 101 steps"),
    "a part without a type": ({"pre_tokenizer": {"pattern": {"Regex": "(a*)*b"}}}, "has a step 'None'"),
    "a template of many texts": (
        {"post_processor": {"type": "TemplateProcessing", "single": PIECES, "pair": [], "special_tokens": {}}},
        "100000 pieces in single",
    ),
    "another model": ({"model": {"type": "WordPiece", "vocab": {}}}, "model has a step 'WordPiece'"),
    "padding to billions": ({"padding": {"strategy": {"Fixed": 10**10}}}, "padding has 10000000000 tokens"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_tokenizer_that_take_long_or_grow_are_refused(tiny_copy: Path, name: str) -> None:
    path = tiny_copy / "tokenizer" / "tokenizer.json"
    changed, message = PARTS[name]
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(CheckpointError, match=message) as refused:
        load_tokenizer(path.parent)
    assert str(refused.value).endswith("take the tokenizer of Qwen3")


def test_the_usual_tokenizers_are_allowed() -> None:
    """Of Qwen2 and 3 as transformers makes them from their vocabulary, and in older files."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    made = Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]).backend_tokenizer.to_str()
    assert PRETOKENIZE_REGEX in json.loads(made)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    check_tokenizer(made.encode(), where="tokenizer.json")
    old = {"model": {"vocab": {}, "merges": []}, "pre_tokenizer": BYTES, "normalizer": None}
    check_tokenizer(json.dumps(old).encode(), where="tokenizer.json")
    for wrong in (b"[]", b"{", b"[" * 100_000):
        with pytest.raises(CheckpointError, match="tokenizer.json: "):
            check_tokenizer(wrong, where="tokenizer.json")


def test_a_template_adds_little_to_the_prompt() -> None:
    def apply(messages: list[dict[str, str]], **options: Any) -> str:
        return messages[0]["content"] * 10

    tokenizer = SimpleNamespace(apply_chat_template=apply)
    encoder = TextEncoder(torch.nn.Identity(), tokenizer, out_layers=(1,))
    with pytest.raises(CheckpointError, match="makes 200000 characters of a prompt of 20000"):
        encoder.tokenize("x" * 20_000, max_sequence_length=8)
