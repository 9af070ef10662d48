"""Qwen's tokenizer without transformers: the same tokens from the same files, in a hundredth of the time to start.

transformers does not read the parts of a Qwen's tokenizer.json: its class has them in itself, takes the vocabulary, and
adds what other files say. So a folder is plain if that makes no difference: its tokenizer.json has the parts of the class,
all special tokens are in it, and no file holds anything that is not known here. Other folders are for transformers.
Knows no networks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.weights.files import read_json
from limner.weights.tokenizer_file import QWEN_WORDS

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

__all__ = ["PlainTokenizer", "plain_tokenizer", "transformers_tokenizer"]

_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *(
            "added_tokens.json",
            "merges.txt",
            "special_tokens_map.json",
            "vocab.json",
        ),  # saved beside, of the same content
        *(".gitattributes", "README.md", "LICENSE"),
    }
)
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_bos_token": (False, None),
    "add_eos_token": (False, None),
    "add_prefix_space": (False, None),
    "backend": ("tokenizers",),
    "clean_up_tokenization_spaces": (False,),
    "errors": ("replace",),
    "padding_side": ("left", "right"),
    "split_special_tokens": (False,),
    "tokenizer_class": _CLASSES,
    "truncation_side": ("right",),
}
_KNOWN = {*_SPECIAL, *_LISTS, *_FIXED, "added_tokens_decoder", "chat_template", "is_local", "local_files_only"} | {
    "model_max_length"
}
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_PRIVATE = re.compile(r"\b_")
"""Names that begin so are refused by transformers in some places."""
_DEFAULT_TOKEN = "<|endoftext|>"
_PARTS: Mapping[str, Any] = {
    "truncation": None,
    "padding": None,
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
    "decoder": {"type": "ByteLevel"},
}
_MODEL: Mapping[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": ("", None),
    "end_of_word_suffix": ("", None),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_UNBOUNDED = int(1e30)


class PlainTokenizer:
    """A tokenizer with the part of transformers' interface that text encoders use, and the same results."""

    def __init__(self, folder: Path, config: Mapping[str, Any], template: str) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._named = {name: token for name in _SPECIAL if (token := _named(config, name)) is not None}
        self._pads_left = config.get("padding_side") == "left"
        self._text = template
        self._template: Template | None = None
        self.model_max_length: int = config.get("model_max_length") or _UNBOUNDED

    def __len__(self) -> int:
        """The number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_template": None}  # compiled code, which no pickle holds

    @property
    def chat_template(self) -> str:
        return self._text

    @property
    def eos_token(self) -> str | None:
        return self._named.get("eos_token")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool, **values: Any
    ) -> str:
        """Return the text of a conversation."""
        assert not tokenize
        if self._template is None:
            self._template = _environment().from_string(self._text)
        return self._template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._named | values,
        )

    def __call__(
        self,
        text: str,
        *,
        truncation: bool,
        padding: str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Return "input_ids" and "attention_mask", as lists, or as tensors (1, S) cut and padded to `max_length`."""
        ids = self._tokenizer.encode(text).ids
        if return_tensors is None:
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        import torch

        assert max_length is not None
        ids = ids[:max_length]
        pad: int = self._tokenizer.token_to_id(self._named["pad_token"])  # type: ignore[assignment]  # it has one
        missing, mask = [pad] * (max_length - len(ids)), [1] * len(ids)
        unread = [0] * len(missing)
        rows = (missing + ids, unread + mask) if self._pads_left else (ids + missing, mask + unread)
        return {name: torch.tensor([row]) for name, row in zip(("input_ids", "attention_mask"), rows, strict=True)}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def plain_tokenizer(folder: Path, made: Mapping[str, Any]) -> PlainTokenizer | None:
    """Return the tokenizer of a folder that was checked, None if it is not plain; `made` is what tokenizer.json holds."""
    names = {path.name for path in folder.iterdir()}
    if not names <= _FILES or "tokenizer_config.json" not in names:
        return None
    config = read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if "chat_template.jinja" in names:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str) or _PRIVATE.search(template):
        return None
    if not _is_plain_config(config) or not _is_plain_file(made):
        return None
    decoder = config.get("added_tokens_decoder")
    if decoder is None and names & {"special_tokens_map.json", "added_tokens.json"}:
        return None  # transformers reads them then
    added = {str(token["id"]): {name: token[name] for name in _FLAGS} for token in made["added_tokens"]}
    if decoder is not None and decoder != added:
        return None
    named = [token for name in _SPECIAL if (token := _named(config, name)) is not None]
    special = {token["content"] for token in added.values() if token["special"]}
    if _named(config, "pad_token") is None or not special.issuperset([*named, *_listed(config)]):
        return None
    return PlainTokenizer(folder, config, template)


def transformers_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder that was checked, as transformers makes it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _named(config: Mapping[str, Any], name: str) -> Any:
    """Return a special token; the class has a default for those that the configuration does not name."""
    return config.get(name, None if name == "bos_token" else _DEFAULT_TOKEN)


def _listed(config: Mapping[str, Any]) -> list[str]:
    return [token for name in _LISTS for token in config.get(name) or []]


def _is_plain_config(config: Mapping[str, Any]) -> bool:
    length = config.get("model_max_length")
    return (
        config.keys() <= _KNOWN
        and "tokenizer_class" in config
        and all(config.get(name, values[0]) in values for name, values in _FIXED.items())
        and all(config.get(name) is None or isinstance(config[name], str) for name in _SPECIAL)
        and all(not config.get(name) or isinstance(config[name], list) for name in _LISTS)
        and all(isinstance(token, str) for token in _listed(config))
        and (length is None or type(length) is int)
    )


def _is_plain_file(made: Mapping[str, Any]) -> bool:
    """Return True for a tokenizer.json with the parts of transformers' class, and added tokens that are whole words."""
    model, added = made.get("model"), made.get("added_tokens")
    return (
        isinstance(model, dict)
        and isinstance(added, list)
        and all(model.get(name, values[0]) in values for name, values in _MODEL.items())
        and model.keys() <= _MODEL.keys() | {"vocab", "merges"}
        and _adds_nothing(made.get("post_processor"))
        and all(_same(made.get(name), part) for name, part in _PARTS.items())
        and all(isinstance(token, dict) and {"id", *_FLAGS} == token.keys() for token in added)
        and not any(token[name] for token in added for name in ("lstrip", "rstrip", "single_word", "normalized"))
    )


def _adds_nothing(after: Any) -> bool:
    """Return True for a post-processor that puts no tokens around the text."""
    kind = after.get("type") if isinstance(after, dict) else None
    alone = [{"Sequence": {"id": "A", "type_id": 0}}]
    return after is None or kind == "ByteLevel" or (kind == "TemplateProcessing" and after.get("single") == alone)


def _same(found: Any, part: Any) -> bool:
    """Return True for equal parts; what `part` leaves out changes no token, as `trim_offsets`."""
    if isinstance(part, dict):
        return isinstance(found, dict) and all(_same(found.get(name), value) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(found, list) and len(found) == len(part) and all(map(_same, found, part))
    return bool(found == part)


def _environment() -> Any:
    """Return transformers' environment for chat templates, as far as `check_template` lets them use it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
