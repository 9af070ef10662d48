"""The metadata of pictures, in and out of files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from tests.support.tiny import picture

import limner
from limner.images import FORMATS, is_ours, picture_metadata, read_metadata, save


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


def test_a_description_that_is_a_number_is_not_ours(tmp_path: Path) -> None:
    """EXIF data with the software "limner" and a description of type SHORT, which Pillow does not write."""
    description = struct.pack("<HHII", ExifTags.Base.ImageDescription, 3, 1, 5)
    software = struct.pack("<HHII", ExifTags.Base.Software, 2, 7, 38)  # its text is behind the two entries
    exif = struct.pack("<2sHIH", b"II", 42, 8, 2) + description + software + bytes(4) + b"limner\0"
    picture(64, 64).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    with Image.open(tmp_path / "a.jpg") as image:
        assert dict(image.getexif()) == {ExifTags.Base.Software: "limner", ExifTags.Base.ImageDescription: 5}
    assert not is_ours(tmp_path / "a.jpg")


@pytest.mark.parametrize("description", ["5", "no JSON", "[" * 9999], ids=["number", "text", "deep"])
def test_what_is_no_metadata_is_not_ours(description: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Software], exif[ExifTags.Base.ImageDescription] = "limner", description
    picture(64, 64).save(tmp_path / "a.jpg", exif=exif)
    assert not is_ours(tmp_path / "a.jpg")


def test_every_picture_has_the_same_values() -> None:
    found = picture_metadata(prompt="a cat", seed=7, model="ab", more={"width": 64})
    assert found == {"prompt": "a cat", "seed": 7, "model": "ab", "version": limner.__version__, "width": 64}
