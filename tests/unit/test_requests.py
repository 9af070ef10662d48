"""The limit on prompts is one number, and holds on every way in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limner import InvalidRequest, Pipeline
from limner.batch.manifest import BrokenRow, Row, read_manifest
from limner.cli import main
from limner.requests import MAX_PROMPT_CHARACTERS, check_prompt
from limner.server.dialects.bfl import Inputs
from limner.server.dialects.openai_schemas import Generation

LONGEST = "x" * MAX_PROMPT_CHARACTERS
PROBLEM = f"has {MAX_PROMPT_CHARACTERS + 1} characters, at most {MAX_PROMPT_CHARACTERS} are allowed"


def test_prompts_have_a_limit(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    check_prompt(LONGEST)
    with pytest.raises(InvalidRequest, match=PROBLEM):
        check_prompt(LONGEST + "x")
    monkeypatch.setattr(type(pipe.text_encoder), "tokenize", lambda *_, **__: pytest.fail("it was tokenized"))
    for prompt in (LONGEST + "x", ["a cat", LONGEST + "x"]):
        with pytest.raises(InvalidRequest, match=PROBLEM):
            pipe(prompt, num_inference_steps=1)


def test_rows_of_a_manifest_have_it(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": LONGEST}, {"id": "b", "prompt": LONGEST + "x"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole, broken = read_manifest(tmp_path / "m.jsonl")
    assert isinstance(whole, Row)
    assert isinstance(broken, BrokenRow)
    assert PROBLEM in str(broken.error)


def test_the_command_line_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", LONGEST + "x", "-o", str(tmp_path / "a.png")]) == 2
    assert PROBLEM in capsys.readouterr().err


def test_both_dialects_have_it() -> None:
    for schema in (Inputs, Generation):
        assert schema.model_json_schema()["properties"]["prompt"]["maxLength"] == MAX_PROMPT_CHARACTERS
