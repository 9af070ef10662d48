"""docs/troubleshooting.md quotes messages that the code really has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import limner

PAGE = Path(__file__).parents[3] / "docs" / "troubleshooting.md"
ROWS = [row for row in re.findall(r"^\|(.*?)\|", PAGE.read_text(), re.M) if row not in (" message ", "---")]
QUOTED = [text for row in ROWS for text in re.findall(r"`([^`]+)`", row) if " " in text]


@cache
def texts() -> str:
    """Return all texts of the code, a line each, with \0 for what is put in."""
    found: list[str] = []
    for file in Path(limner.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if id(node) in plain:
                continue
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_each_row_quotes_a_message() -> None:
    assert len(ROWS) > 20
    assert [row for row in ROWS if not re.search("`[^`]* [^`]*`", row)] == []


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_is_one_of_the_code(message: str) -> None:
    """The parts between dots stand in one text, in their order; the field before the first colon is put in."""
    body = re.sub(r"^\w+: ", "", message)
    parts = [re.escape(part.strip()) for part in body.split("...") if part.strip()]
    assert re.search("[^\n]*".join(parts), texts()), message
