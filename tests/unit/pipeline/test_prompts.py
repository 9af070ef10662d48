"""Prompts: reports of what is cut, and the cache of tokens."""

from __future__ import annotations

import logging

import pytest

from limner import Pipeline


def test_reports_prompts_that_are_cut(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "limner"):
        out = pipe("a dog " * 60 + "zebra", height=64, width=64)
    (report,) = out.prompts
    assert report.num_tokens > report.limit == pipe.text_encoder.max_length
    assert report.cut.count("dog") >= 20
    assert report.cut.endswith("zebra")
    assert report.cut in caplog.text
    assert pipe("a dog", height=64, width=64).prompts[0].cut == ""


def test_prompts_are_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *a, **k: calls.append(a) or original(*a, **k))
    for prompt in ("a dog", "a fox", "a dog"):
        pipe(prompt, height=64, width=64, num_inference_steps=1)
    assert len(calls) == 2
    for i in range(20):
        pipe(f"dog {i}", height=64, width=64, num_inference_steps=1)
    assert len(pipe._prompts._cache) == 16
