"""What a call looks like to people and type checkers: a bar, short texts of objects, pictures in notebooks."""

from __future__ import annotations

import inspect
import io
import sys
from typing import Any

import pytest
from PIL import Image
from tests.support.tiny import picture

import limner
from limner import errors
from limner.pipeline import Pipeline
from limner.pipeline.call_types import CallArguments
from limner.pipeline.progress_bar import LOADING, ProgressBar, reporting

SIZE: Any = {"width": 64, "height": 64}


def test_types_of_a_call_are_those_of_its_signature() -> None:
    found = {
        name: str(one.annotation)
        for name, one in inspect.signature(inspect.unwrap(Pipeline.__call__)).parameters.items()
        if name not in ("self", "prompt", "return_dict", "control")
    }
    own = {n: a for n, a in inspect.get_annotations(CallArguments).items() if n in CallArguments.__annotations__}
    typed = {name: getattr(a, "__forward_arg__", str(a)) for name, a in own.items()}
    control = set(limner.requests.Control.__annotations__)
    assert {name: kind for name, kind in typed.items() if name not in control} == found


def test_a_bar_for_people_alone(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    pipe("a", **SIZE)
    assert shown.getvalue() == ""
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    pipe("a", **SIZE, progress=False)
    assert shown.getvalue() == ""
    pipe("a", **SIZE, num_inference_steps=2)
    assert "step" in shown.getvalue()
    assert "decode" in shown.getvalue()
    before = shown.getvalue()
    pipe.draw([limner.EditRequest(prompt="a", seeds=(1,), **SIZE)])  # an engine's
    assert shown.getvalue() == before


def test_a_bar_reaches_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = ProgressBar(LOADING)
    for part, done, of in (("load", 1, 1), ("text", 1, 1), ("references", 1, 1), ("step", 1, 50), ("step", 50, 50)):
        bar(part, done, of)
    assert (bar._bar.n, bar._bar.total) == (55, 56)
    bar("decode", 1, 1)
    assert bar._bar.n == bar._bar.total == 56
    bar.close()


def test_progress_of_the_caller_is_called() -> None:
    heard: list[tuple[str, int, int]] = []
    with reporting(lambda *what: heard.append(what)) as report:
        report("text", 0, 1)
    assert heard == [("text", 0, 1)]


def test_short_texts(pipe: Pipeline) -> None:
    refs = pipe.prefill([picture(64, 64), picture(64, 80, seed=1)])
    out = pipe("a", references=refs, num_images_per_prompt=2, **SIZE)
    for one in (refs, out, pipe):
        assert len(repr(one)) < 200
        assert "\n" not in repr(one)
    assert repr(refs).startswith("References(64x64, 64x80: 36 tokens, ")
    assert refs.key[:12] in repr(refs)
    assert "2 of 64x64" in repr(out)
    assert repr(pipe).startswith("Pipeline(")
    assert str(pipe.kind) in repr(pipe)


def test_pictures_show_in_notebooks(pipe: Pipeline) -> None:
    out = pipe("a", num_images_per_prompt=2, **SIZE)
    shown = Image.open(io.BytesIO(out._repr_png_() or b""))
    assert shown.size == (128, 64)
    assert shown.crop((64, 0, 128, 64)).tobytes() == out.images[1].tobytes()
    assert pipe("a", output_type="latent", **SIZE)._repr_png_() is None


def test_every_public_error_is_exported() -> None:
    public = {name for name in errors.__all__ if name[0].isupper()}
    assert public <= set(limner.__all__)
    assert all(getattr(limner, name) is getattr(errors, name) for name in public)


def test_help_starts_with_an_example() -> None:
    assert "limner.Pipeline.from_pretrained()" in (limner.__doc__ or "").split("Pipeline` is")[0]
