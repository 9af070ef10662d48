"""Signing: what a manifest holds, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from PIL import Image
from tests.support.provenance import FORMATS, METADATA, Server, made, references
from tests.support.tiny import picture

import limner
from limner import InvalidRequest, LimnerError, MissingExtra
from limner.images import MEDIA_TYPES, decode, encode, read_metadata
from limner.trust.provenance import Ingredient, Signer, development_credentials, read, sign


def manifest_of(data: bytes, format: str) -> dict[str, Any]:  # noqa: A002
    """The active manifest, by the library itself."""
    with c2pa.Reader(MEDIA_TYPES[format.lower()], io.BytesIO(data)) as reader:
        store = json.loads(reader.json())
    assert store["validation_state"] == "Valid"
    return store["manifests"][store["active_manifest"]]  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", FORMATS)
def test_created(format: str, signer: Signer) -> None:  # noqa: A002
    data = made(format)
    signed = sign(data, format=format, title="a cat", action="created", metadata=METADATA, signer=signer)
    report = read(signed)
    assert (report.format, report.state, report.problems, report.whole) == (format, "Valid", (), True)
    assert (report.actions, report.source_type, report.ingredients) == (
        ("c2pa.created",),
        "trainedAlgorithmicMedia",
        (),
    )
    assert (report.title, report.generator) == ("a cat", f"Limner {limner.__version__}")
    assert report.metadata == METADATA == read_metadata(signed)
    assert report.generation == {**METADATA, "version": limner.__version__, "development": True}
    assert np.array_equal(np.asarray(decode(signed)), np.asarray(decode(data)))
    found = manifest_of(signed, format)
    action = next(a for a in found["assertions"] if a["label"] == "c2pa.actions.v2")["data"]["actions"][0]
    assert action["digitalSourceType"] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert action["softwareAgent"] == {"name": "Limner", "version": limner.__version__}


@pytest.mark.parametrize("format", FORMATS)
def test_edited(format: str, signer: Signer) -> None:  # noqa: A002
    ingredients = references("PNG", "JPEG", "WEBP")
    signed = sign(made(format), format=format, title="t", action="edited", ingredients=ingredients, signer=signer)
    report = read(signed)
    assert (report.state, report.whole) == ("Valid", True)
    assert report.actions == ("c2pa.opened", "c2pa.edited")
    assert report.ingredients == ("parentOf", "inputTo", "inputTo")
    found = manifest_of(signed, format)
    assert [(i["title"], i["format"]) for i in found["ingredients"]] == [
        ("reference 1", "image/png"),
        ("reference 2", "image/jpeg"),
        ("reference 3", "image/webp"),
    ]
    opened, edited = next(a for a in found["assertions"] if a["label"] == "c2pa.actions.v2")["data"]["actions"]
    assert [len(a["parameters"]["ingredients"]) for a in (opened, edited)] == [1, 3]


@pytest.mark.parametrize("control", [{"mask": "0" * 64, "box": [0, 0, 64, 64]}, {"preserve": "auto"}])
def test_what_keeps_pixels_of_the_canvas_is_a_composite(control: dict[str, Any], signer: Signer) -> None:
    metadata = METADATA | control
    data = made("PNG")
    signed = sign(
        data, format="PNG", title="t", action="edited", ingredients=references("PNG"), metadata=metadata, signer=signer
    )
    report = read(signed)
    assert report.source_type == "compositeWithTrainedAlgorithmicMedia"
    assert control.items() <= report.generation.items()


def test_no_picture_of_a_reference_is_in_the_manifest(signer: Signer) -> None:
    """The library adds thumbnails unless it is told not to."""
    ingredients = [Ingredient(data=encode(picture(400, 400), "PNG"), title="a")]
    signed = sign(made(), format="PNG", title="t", action="edited", ingredients=ingredients, signer=signer)
    found = manifest_of(signed, "PNG")
    assert "thumbnail" not in found
    assert "thumbnail" not in found["ingredients"][0]
    assert len(signed) - len(made()) < 6000


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_that_was_signed_before_has_one_manifest(format: str, signer: Signer) -> None:  # noqa: A002
    once = sign(made(format), format=format, title="1", action="created", signer=signer)
    twice = sign(once, format=format, title="2", action="created", signer=signer)
    assert read(twice).title == "2"
    assert abs(len(twice) - len(once)) < 100


def test_references_that_the_library_does_not_take(signer: Signer, caplog: pytest.LogCaptureFixture) -> None:
    """A PNG cut in its last chunk can be drawn from; the picture is signed all the same."""
    cut = encode(picture(64, 64), "PNG")[:-3]
    decode(cut)
    with caplog.at_level(logging.INFO, logger="limner"):
        signed = sign(
            made(),
            format="PNG",
            title="t",
            action="edited",
            ingredients=[Ingredient(data=cut, title="a")] * 2,
            signer=signer,
        )
    assert read(signed).ingredients == ("parentOf", "inputTo")
    assert caplog.text.count("its own manifest is left out") == 2


def test_refuses_to_sign(signer: Signer) -> None:
    one = references("PNG")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"format": "GIF", "action": "created"}, "format: 'GIF' cannot be signed; use PNG, JPEG, WEBP"),
        ({"action": "created", "ingredients": one}, "action: 'created' with 1 references"),
        ({"action": "edited"}, "action: 'edited' with 0 references; use 'edited' with references"),
        ({"action": "moved"}, "action: 'moved'"),
        (
            {"action": "edited", "ingredients": [*one, Ingredient(data=b"x", title="x")]},
            "ingredients: reference 2 is not",
        ),
    )
    for options, message in cases:
        with pytest.raises(InvalidRequest, match=message):
            sign(made(), title="t", signer=signer, **{"format": "PNG", **options})
    with pytest.raises(LimnerError, match="C2PA: the picture could not be signed"):
        sign(b"no picture", format="PNG", title="t", action="created", signer=signer)
    with pytest.raises(LimnerError, match="C2PA: the picture could not be signed"):
        sign(made(), format="PNG", title="t", action="created", signer=replace(signer, private_key=b"no key"))


def test_signs_in_threads(signer: Signer) -> None:
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        for _ in range(5):
            data = sign(
                made("JPEG", seed=number),
                format="JPEG",
                title=str(number),
                action="edited",
                ingredients=references("PNG", "PNG"),
                signer=signer,
            )
            found[number] = read(data)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: (report.state, report.title, report.metadata["seed"]) for number, report in found.items()} == {
        number: ("Valid", str(number), number) for number in range(4)
    }


def test_a_timestamp_authority_is_asked_only_if_given(signer: Signer, server: Server) -> None:
    sign(made(), format="PNG", title="t", action="created", signer=signer)
    assert server.hits == []
    with pytest.raises(LimnerError, match="could not be signed .*500.*timestamp authority"):
        sign(
            made(), format="PNG", title="t", action="created", signer=replace(signer, timestamp_url=f"{server.url}tsa")
        )
    assert server.hits == ["/tsa"]


def test_without_the_extra(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = sign(made(), format="PNG", title="t", action="created", signer=signer)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setattr("limner.trust.provenance.report.has_c2pa", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = read(made())
    assert (report.checked, report.state) == (False, None)
    assert report.metadata
    assert "no manifest in the file; pip install c2pa-python" in report.describe()[1]
    for call in (
        lambda: read(signed),
        lambda: sign(made(), format="PNG", title="t", action="created", signer=signer),
        lambda: development_credentials(tmp_path / "c2pa"),
    ):
        with pytest.raises(MissingExtra, match=r"C2PA needs .*, which is not installed; pip install 'limner\[serve\]'"):
            call()
    assert os.listdir(tmp_path) == []


def test_pictures_keep_their_other_parts(signer: Signer) -> None:
    """A colour profile and transparency are as they were."""
    image = Image.new("RGBA", (64, 64), (1, 2, 3, 99))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=b"profile" * 20)
    signed = sign(buffer.getvalue(), format="png", title="t", action="created", signer=signer)
    with Image.open(io.BytesIO(signed)) as found:
        assert found.info["icc_profile"] == b"profile" * 20
        assert found.getpixel((0, 0)) == (1, 2, 3, 99)
