"""Manifests: what is written, that it validates, that every change is seen, and that nothing leaves the machine."""

from __future__ import annotations

import datetime
import io
import json
import logging
import os
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from tests.support.tiny import picture

import limner
from limner import InvalidRequest, LimnerError, MissingExtra, OutputError
from limner.images import decode, encode, read_metadata
from limner.trust.provenance import MIME_TYPES, Ingredient, Signer, development_credentials, read, sign

METADATA = {"prompt": "a cat ☂", "seed": 2**63 - 1, "references": ["ab"], "width": 64, "strength": 0.5, "lora": None}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return development_credentials(tmp_path_factory.mktemp("c2pa") / "development")


def made(format: str = "PNG", **changes: Any) -> bytes:  # noqa: A002
    return encode(picture(64, 48), format, metadata=METADATA | changes)


def references(*formats: str) -> list[Ingredient]:
    return [
        Ingredient(data=encode(picture(80, 64, seed=i), format), title=f"reference {i}")
        for i, format in enumerate(formats, start=1)  # noqa: A001
    ]


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def pixel_byte(data: bytes, format: str) -> int:  # noqa: A002
    """A byte of the compressed pixels."""
    return data.rfind({"PNG": b"IDAT", "JPEG": b"\xff\xda", "WEBP": b"VP8 "}[format]) + 100


def manifest_of(data: bytes, format: str) -> dict[str, Any]:  # noqa: A002
    """The active manifest, by the library itself."""
    with c2pa.Reader(MIME_TYPES[format], io.BytesIO(data)) as reader:
        store = json.loads(reader.json())
    assert store["validation_state"] == "Valid"
    return store["manifests"][store["active_manifest"]]  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", MIME_TYPES)
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


@pytest.mark.parametrize("format", MIME_TYPES)
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


def test_no_picture_of_a_reference_is_in_the_manifest(signer: Signer) -> None:
    """The library adds thumbnails unless it is told not to."""
    ingredients = [Ingredient(data=encode(picture(400, 400), "PNG"), title="a")]
    signed = sign(made(), format="PNG", title="t", action="edited", ingredients=ingredients, signer=signer)
    found = manifest_of(signed, "PNG")
    assert "thumbnail" not in found
    assert "thumbnail" not in found["ingredients"][0]
    assert len(signed) - len(made()) < 6000


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


@pytest.mark.parametrize("format", MIME_TYPES)
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


@pytest.mark.parametrize("format", MIME_TYPES)
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
        (tmp_path, "is not a file"),
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


def by_somebody(data: bytes, format: str, signer: Signer, *, name: str = "other", remote: str = "") -> bytes:  # noqa: A002
    """A picture signed by another program, its manifest in it or kept at an address."""
    source_type = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    actions = [{"action": "c2pa.created", "digitalSourceType": source_type}]
    definition = {
        "claim_generator_info": [{"name": name}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }
    info = c2pa.C2paSignerInfo("es256", signer.certificates, signer.private_key, None)
    result = io.BytesIO()
    with (
        c2pa.Context.from_dict({"verify": {"verify_after_sign": False}}) as context,
        c2pa.Builder(definition, context) as builder,
        c2pa.Signer.from_info(info) as native,
    ):
        if remote:
            builder.set_no_embed()
            builder.set_remote_url(remote)
        builder.sign(native, MIME_TYPES[format], io.BytesIO(data), result)
    return result.getvalue()


@pytest.mark.parametrize("format", MIME_TYPES)
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
    assert caplog.text.count("has no part of its own in the manifest") == 2


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


class Server:
    """An HTTP server that counts who comes."""

    def __init__(self) -> None:
        hits = self.hits = []  # type: list[str]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hits.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(500)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()
    server.thread.join()
    server.server.server_close()


@pytest.mark.parametrize("format", MIME_TYPES)
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
        c2pa.Reader(MIME_TYPES[format], io.BytesIO(remote))
    assert server.hits == ["/m.c2pa"]


def test_a_timestamp_authority_is_asked_only_if_given(signer: Signer, server: Server) -> None:
    sign(made(), format="PNG", title="t", action="created", signer=signer)
    assert server.hits == []
    with pytest.raises(LimnerError, match="could not be signed .*500.*timestamp authority"):
        sign(
            made(), format="PNG", title="t", action="created", signer=replace(signer, timestamp_url=f"{server.url}tsa")
        )
    assert server.hits == ["/tsa"]


def test_development_credentials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "c2pa"
    with caplog.at_level(logging.WARNING, logger="limner"):
        signer = development_credentials(folder)
    assert "made a development certificate" in caplog.text
    assert sorted(os.listdir(folder)) == ["certificate.pem", "key.pem", "root.pem"]
    assert os.listdir(folder.parent) == ["c2pa"]
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert signer.development
    assert signer.common_name == "Limner development certificate"
    assert b"PRIVATE" not in repr(signer).encode()
    assert development_credentials(folder) == signer  # kept
    (tmp_path / "empty").mkdir()
    assert development_credentials(tmp_path / "empty").private_key != signer.private_key
    signed = sign(made(), format="PNG", title="t", action="created", signer=signer)
    report = read(signed)
    assert report.development
    assert "for development only" in "\n".join(report.describe())
    assert (report.issuer, report.signed_by) == ("Limner development (not for production)", signer.common_name)
    assert read(signed, trust=(folder / "root.pem").read_bytes()).state == "Trusted"
    assert read(signed, trust=(tmp_path / "empty" / "root.pem").read_bytes()).state == "Valid"


def test_refuses_folders(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="full cannot be made .*; give a new or empty folder"):
        development_credentials(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    with pytest.raises(OutputError, match="cannot be made"):
        development_credentials(tmp_path / "full" / "notes.txt" / "c2pa")


def test_two_processes_at_once_get_one_certificate(tmp_path: Path) -> None:
    found: list[Signer] = []
    threads = [
        threading.Thread(target=lambda: found.append(development_credentials(tmp_path / "c2pa"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({signer.private_key for signer in found}) == 1
    assert os.listdir(tmp_path) == ["c2pa"]


def operator(
    folder: Path,
    *,
    key: Any = None,
    purpose: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    days: tuple[int, int] = (-1, 30),
    by_itself: bool = False,
) -> tuple[Path, Path]:
    """A chain of a studio's and its key, as files."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    root_key = ec.generate_private_key(ec.SECP384R1())

    def name(common: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Studio Ltd")
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(name("Studio"))
        .issuer_name(name("Studio" if by_itself else "Studio root"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
    )
    if purpose is not None:
        leaf = leaf.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    chain = folder / "chain.pem"
    chain.write_bytes(leaf.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret = folder / "secret.pem"
    secret.touch(mode=0o600)
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, secret


@pytest.mark.parametrize("algorithm", ["es256", "es384", "es512", "ed25519", "ps256"])
def test_keys_of_an_operator(algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = {
        "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "es512": lambda: ec.generate_private_key(ec.SECP521R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "ps256": lambda: rsa.generate_private_key(65537, 2048),
    }[algorithm]()
    signer = Signer.from_files(*operator(tmp_path, key=key))
    assert (signer.algorithm, signer.development, signer.common_name) == (algorithm, False, "Studio")
    report = read(sign(made(), format="PNG", title="t", action="created", signer=signer))
    assert (report.state, report.development, report.issuer) == ("Valid", False, "Studio Ltd")
    assert report.generation["development"] is False
    assert "development" not in "\n".join(report.describe())
    assert caplog.text == ""


def test_refuses_certificates_and_keys(tmp_path: Path) -> None:
    def files(**options: Any) -> tuple[Path, Path]:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        return operator(folder, **options)

    chain, key = files()
    _, other = files()
    junk = tmp_path / "junk.pem"
    junk.write_text("hello")
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    cases = (
        ((tmp_path / "none.pem", key), "certificate: .*none.pem cannot be read"),
        ((chain, tmp_path / "none.pem"), "key: .*none.pem cannot be read"),
        ((junk, key), "certificate: .*junk.pem is no chain of certificates in PEM"),
        ((chain, junk), "key: .*junk.pem is no private key in PEM"),
        ((chain, locked), "key: .*locked.pem is encrypted"),
        ((chain, other), "key: .* is not the key of the first certificate"),
        (files(days=(-9, -2)), "certificate: .* is valid from .*; give one that is valid now"),
        (files(days=(2, 9)), "certificate: .* is valid from"),
        (files(by_itself=True), "certificate: .* is signed by itself"),
        (files(purpose=None), "certificate: .* has no extended key usage for C2PA"),
        (files(purpose=ExtendedKeyUsageOID.SERVER_AUTH), "certificate: .* has no extended key usage for C2PA"),
        (files(key=rsa.generate_private_key(65537, 1024)), "key: .* is a key that C2PA does not take"),
        (files(key=ec.generate_private_key(ec.SECP256K1())), "key: .* is a key that C2PA does not take"),
    )
    for (certificate, secret), message in cases:
        with pytest.raises(InvalidRequest, match=message):
            Signer.from_files(certificate, secret)


def test_a_key_that_others_can_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain, key = operator(tmp_path)
    key.chmod(0o644)
    Signer.from_files(chain, key)
    assert "secret.pem can be read by others than its owner; chmod 600 it" in caplog.text


def test_another_certificate_is_not_taken_for_a_development_one(tmp_path: Path) -> None:
    chain, key = operator(tmp_path)
    (tmp_path / "c2pa").mkdir()
    chain.rename(tmp_path / "c2pa" / "certificate.pem")
    key.rename(tmp_path / "c2pa" / "key.pem")
    with pytest.raises(InvalidRequest, match="folder: .* holds the certificate of 'Studio', none for development"):
        development_credentials(tmp_path / "c2pa")


def test_without_the_extra(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (
        lambda: read(made()),
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
