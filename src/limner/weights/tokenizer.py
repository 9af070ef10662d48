"""Load the tokenizer of a model folder, as data alone: no code, no files that wait or grow without bounds.

A chat template is a program in Jinja. It is run for one user turn, so only the part of the language that formats messages
is allowed, in which the text grows no more than the template is long. Knows no networks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError

from limner.errors import CheckpointError, first_line
from limner.files import open_regular
from limner.weights.files import read_json
from limner.weights.plain_tokenizer import plain_tokenizer, transformers_tokenizer
from limner.weights.tokenizer_file import check_tokenizer

__all__ = ["check_template", "load_tokenizer"]

_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_MODEL_TYPES = ("qwen2", "qwen3")
_MAX_FILES = 100
_MAX_BYTES = 64 << 20
"""Of one file; klein's tokenizer.json has 11 MB."""
_TOKENIZER = "tokenizer.json"
_VOCABULARIES = (_TOKENIZER, "vocab.json")
"""JSON files that the tokenizer's library reads, and that hold a vocabulary."""
_MAX_TEMPLATE = 32 << 10
"""Characters of a chat template; Qwen3's has 4,000."""
_MAX_NODES = 4000
_FILTERS = ("length", "count", "first", "last", "items", "default", "d", "int")
_TEXT_FILTERS = ("tojson", "trim", "upper", "lower", "safe", "string")
"""Filters that write any value as text, which may be several times as long."""
_METHODS = (
    *(
        "split",
        "rsplit",
        "strip",
        "lstrip",
        "rstrip",
        "startswith",
        "endswith",
        "get",
        "items",
        "keys",
        "upper",
        "lower",
    ),
)
_FUNCTIONS = ("namespace", "raise_exception")
_LISTS = ("messages", "tools", "tool_calls")
"""What a template may loop over: lists that are short or absent."""
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem),
    *(nodes.Slice, nodes.If, nodes.For, nodes.Assign, nodes.NSRef, nodes.Call, nodes.Keyword, nodes.Filter, nodes.Test),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Concat, nodes.Neg),
    *(nodes.CondExpr, nodes.List, nodes.Tuple, nodes.Break, nodes.Continue),
)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, a `PlainTokenizer` or one of transformers. Raises `CheckpointError`."""
    made = _check_files(folder)
    try:
        tokenizer = plain_tokenizer(folder, made) if made is not None else None
        if tokenizer is None:
            tokenizer = transformers_tokenizer(folder)
    except Exception as error:  # three libraries raise their own types for a damaged tokenizer
        raise CheckpointError(f"{folder}: the tokenizer cannot be used ({first_line(error)})") from error
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if template is not None:
            check_template(template, where=folder)
    return tokenizer


def _check_files(folder: Path) -> dict[str, Any] | None:
    """Refuse what is no small regular file, and configurations that name code or another tokenizer.

    Returns what the folder's tokenizer.json holds, None if there is none.
    """
    made = None
    found = [Path(base) / name for base, _, names in os.walk(folder) for name in names]
    if len(found) > _MAX_FILES:
        raise CheckpointError(f"{folder}: has {len(found)} files; a tokenizer has at most {_MAX_FILES}")
    for path in found:
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read() if path.name == _TOKENIZER and size <= _MAX_BYTES else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from error
        if size > _MAX_BYTES:
            raise CheckpointError(
                f"{path}: has {size} bytes, a tokenizer's file at most {_MAX_BYTES}; download it again"
            )
        if data is not None:
            found_here = check_tokenizer(data, where=path)
            made = found_here if path.parent == folder else made
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            config = read_json(path)
            for key, allowed in (("tokenizer_class", _CLASSES), ("model_type", _MODEL_TYPES)):
                if config.get(key) not in (None, *allowed):
                    raise CheckpointError(
                        f"{path}: {key}={str(config[key])[:80]!r} is not supported; allowed: {', '.join(allowed)}"
                    )
    return made


def check_template(text: object, *, where: object) -> None:
    """Raise `CheckpointError` for a chat template that may run long or grow, or that does more than format messages."""
    if not isinstance(text, str) or len(text) > _MAX_TEMPLATE:
        size = f"{len(text)} characters" if isinstance(text, str) else f"type {type(text).__name__}"
        raise CheckpointError(f"{where}: the chat template has {size}; allowed: a text of at most {_MAX_TEMPLATE}")
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        every = _parts(tree)
    except (TemplateError, RecursionError) as error:
        raise CheckpointError(f"{where}: the chat template is not Jinja ({first_line(error)})") from error
    if len(every) > _MAX_NODES:
        raise CheckpointError(f"{where}: the chat template has {len(every)} parts; at most {_MAX_NODES} are allowed")
    for node in every:
        if (problem := _problem(node)) is not None:
            raise CheckpointError(
                f"{where}: the chat template uses {problem} in line {node.lineno}, which can run or grow without bounds; "
                "allowed: conditions, loops over messages and tools, and the usual functions on text; take Qwen3's template"
            )


def _problem(node: nodes.Node) -> str | None:
    """Return what a node does that is not allowed."""
    if not isinstance(node, _NODES):
        return type(node).__name__
    if isinstance(node, nodes.For) and (node.recursive or not _is_list(node.iter)):
        return "a loop over anything else than messages and tools"
    if isinstance(node, (nodes.Name, nodes.NSRef, nodes.Keyword)) and _is_list_assigned(node):
        return "a new value of messages or tools"
    if isinstance(node, nodes.Filter) and node.name not in (*_FILTERS, *_TEXT_FILTERS):
        return f"the filter {node.name}"
    if isinstance(node, nodes.Call) and not _is_known(node.node):
        return "a function"
    if _grows(node):
        return "a value that is made longer step by step"
    return None


def _parts(node: nodes.Node) -> list[nodes.Node]:
    """Return a node and all inside it."""
    return [node, *node.find_all(nodes.Node)]


def _is_list(value: nodes.Node) -> bool:
    while isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice):
        value = value.node
    if isinstance(value, nodes.Name):
        return value.name in _LISTS
    return isinstance(value, nodes.Getattr) and value.attr in _LISTS


def _is_list_assigned(node: nodes.Name | nodes.NSRef | nodes.Keyword) -> bool:
    if isinstance(node, nodes.Name):
        return node.ctx != "load" and node.name in _LISTS
    return (node.attr if isinstance(node, nodes.NSRef) else node.key) in _LISTS


def _grows(node: nodes.Node) -> bool:
    """Return True where a longer text is kept, cut up or written as text again, which may double it each time."""
    if isinstance(node, nodes.Assign):
        return any(map(_is_longer, _parts(node.node)))
    if isinstance(node, (nodes.Keyword, nodes.Call)):
        return any(map(_is_longer, _parts(node)))
    return _is_text_filter(node) and sum(map(_is_text_filter, _parts(node))) > 1


def _is_longer(node: nodes.Node) -> bool:
    return isinstance(node, (nodes.Add, nodes.Concat, nodes.List, nodes.Tuple)) or _is_text_filter(node)


def _is_text_filter(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Filter) and node.name in _TEXT_FILTERS


def _is_known(function: nodes.Expr) -> bool:
    if isinstance(function, nodes.Name):
        return function.name in _FUNCTIONS
    return isinstance(function, nodes.Getattr) and function.attr in _METHODS
