"""The metadata of pictures, in and out of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny import picture

import limner
from limner.images import FORMATS, picture_metadata, read_metadata, save


@pytest.mark.parametrize("ending", FORMATS)
def test_a_very_long_prompt_does_not_lose_the_picture(ending: str, tmp_path: Path) -> None:
    prompt = "a ☂ " * 30000
    save(picture(64, 48), tmp_path / f"out{ending}", metadata={"prompt": prompt, "seed": 3})
    found = read_metadata(tmp_path / f"out{ending}")
    assert found["seed"] == 3
    if ending == ".png":
        assert found["prompt"] == prompt
    else:
        assert prompt.startswith(found["prompt"])
        assert (len(found["prompt"]), found["prompt_length"], len(found["prompt_sha256"])) == (4000, len(prompt), 64)


def test_other_pictures_have_no_metadata(tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {}


def test_every_picture_has_the_same_values() -> None:
    found = picture_metadata(prompt="a cat", seed=7, model="ab", more={"width": 64})
    assert found == {"prompt": "a cat", "seed": 7, "model": "ab", "version": limner.__version__, "width": 64}
