"""Reading: every change is seen, and nothing is fetched."""

from __future__ import annotations

import io
from pathlib import Path

import c2pa
import pytest
from tests.support.provenance import FORMATS, METADATA, Server, by_somebody, flipped, made, pixel_byte
from tests.support.tiny import picture

from limner import InvalidRequest
from limner.images import MEDIA_TYPES, encode
from limner.trust.provenance import Ingredient, Signer, read, sign


def test_a_chain_of_edits(signer: Signer) -> None:
    first = sign(made(), format="PNG", title="1", action="created", signer=signer)
    second = sign(
        made("JPEG"),
        format="JPEG",
        title="2",
        action="edited",
        ingredients=[
            Ingredient(data=first, title="1"),
            Ingredient(data=flipped(first, pixel_byte(first, "PNG")), title="x"),
        ],
        signer=signer,
    )
    report = read(second)
    assert (report.state, report.title) == ("Valid", "2")
    assert report.ingredients == ("parentOf", "inputTo (its own manifest is broken)")


@pytest.mark.parametrize("format", FORMATS)
def test_changes_are_seen(format: str, signer: Signer) -> None:  # noqa: A002
    signed = sign(made(format), format=format, title="t", action="created", metadata=METADATA, signer=signer)
    report = read(flipped(signed, pixel_byte(signed, format)))
    assert (report.state, report.whole) == ("Invalid", False)
    assert "the file was changed after it was signed" in report.problems
    assert "C2PA: broken; signed by Limner development certificate" in "\n".join(report.describe())
    report = read(flipped(signed, signed.find(b"limner.generation") + 60))
    assert report.state == "Invalid"
    assert "the manifest was changed after it was signed" in report.problems
    report = read(flipped(signed, signed.find(b"Limner development certificate")))
    assert (report.state, report.whole) == ("Invalid", False)
    assert "the signature does not fit the manifest" in report.problems
    changed = (
        signed.replace(b"a cat", b"a dog", 1) if format != "PNG" else signed.replace(b'"width": 64', b'"width": 65', 1)
    )
    assert changed != signed
    assert not read(changed).whole
    for damaged in (flipped(signed, signed.find(b"jumd") + 6), signed[: len(signed) // 2]):  # nothing of it can be read
        report = read(damaged)
        assert (report.state, report.whole) == ("Invalid", False)
        assert "the manifest cannot be read" in "\n".join(report.problems)


@pytest.mark.parametrize("format", FORMATS)
def test_without_a_manifest(format: str) -> None:  # noqa: A002
    report = read(made(format))
    assert (report.state, report.metadata, report.whole) == (None, METADATA, True)
    assert report.describe()[1] == "C2PA: no manifest"
    other = io.BytesIO()
    picture(64, 64).save(other, format)
    assert read(other.getvalue()).describe() == ["metadata: none of Limner", "C2PA: no manifest"]


def test_metadata_that_was_changed_is_a_problem() -> None:
    report = read(made("JPEG").replace(b'{"height"', b"{height", 1).replace(b'{"lora"', b'{_lora"', 1))
    assert (report.state, report.whole) == (None, False)
    assert report.problems == ("Limner's metadata was changed and cannot be read",)


def test_refuses_what_is_no_picture(tmp_path: Path) -> None:
    for data in (b"", b"hello", b"GIF89a" + b"\0" * 99):
        with pytest.raises(InvalidRequest, match=r"file: \(\d+ bytes\) is not a PNG, JPEG or WebP picture"):
            read(data)
    for data in (made()[:-200], made("WEBP")[:-60], b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(InvalidRequest, match=r"file: \(\d+ bytes\) is truncated or damaged; get it again"):
            read(data)
    for path, message in (
        (tmp_path, "is a folder; give a picture file in it"),
        (tmp_path / "a.png", "cannot be read"),
        ("a\0b", "not a file name"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            read(path)


def test_text_of_a_file_cannot_steer_a_terminal(signer: Signer) -> None:
    """Metadata, and the names in a manifest of somebody else's."""
    data = encode(picture(64, 48), "PNG", metadata={"prompt": "\x1b[2J"})
    signed = by_somebody(data, "PNG", signer, name="\x1b]0;x\x07")
    report = read(signed)
    assert "\x1b" in report.generator
    assert all(line.isprintable() for line in report.describe())


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_fetched(format: str, signer: Signer, server: Server) -> None:  # noqa: A002
    """A reference may name an address for its manifest; nobody goes there, though the library would."""
    remote = by_somebody(made(format), format, signer, remote=f"{server.url}m.c2pa")
    report = read(remote)
    assert (report.state, report.remote, report.whole) == (None, f"{server.url}m.c2pa", True)
    assert report.describe()[1] == f"C2PA: not in the file; kept at {server.url}m.c2pa, not fetched"
    ingredients = [Ingredient(data=remote, title="a")]
    signed = sign(made(format), format=format, title="t", action="edited", ingredients=ingredients, signer=signer)
    assert read(signed).state == "Valid"
    assert server.hits == []
    with pytest.raises(c2pa.C2paError, match="Remote"):
        c2pa.Reader(MEDIA_TYPES[format.lower()], io.BytesIO(remote))
    assert server.hits == ["/m.c2pa"]
