"""What people may read of a model, from its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from limner.engine.about import ModelAbout, about_model
from limner.errors import CheckpointError
from limner.options import ModelOptions
from limner.weights.folder import read_settings


def test_the_bundled_model_has_a_card_and_words() -> None:
    about = about_model(ModelOptions())
    assert about.card is not None
    assert about.card.startswith("# The bundled model")
    assert {"put", "cat", "snow"} <= set(about.words)
    assert "spaceship" not in about.words


def test_a_folder_without_a_card_a_hub_id_and_a_broken_folder(tiny_copy: Path, tmp_path: Path) -> None:
    assert about_model(ModelOptions(model=str(tiny_copy))) == ModelAbout()
    (tiny_copy / "README.md").write_bytes(b"# \xff")
    assert about_model(ModelOptions(model=str(tiny_copy))).card == "# \N{REPLACEMENT CHARACTER}"
    hub = about_model(ModelOptions(model="black-forest-labs/FLUX.2-klein-4B"))
    assert hub.url == "https://huggingface.co/black-forest-labs/FLUX.2-klein-4B"
    assert about_model(ModelOptions(model="klein-4b")).url == hub.url
    assert about_model(ModelOptions(model=str(tmp_path))) == ModelAbout()


def test_words_that_are_no_list_are_refused(tiny_copy: Path) -> None:
    (tiny_copy / "limner.json").write_text('{"words": "cat"}')
    with pytest.raises(CheckpointError, match="words=cat has to be a list"):
        read_settings(tiny_copy)
