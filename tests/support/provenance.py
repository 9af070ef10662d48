"""Signed pictures for tests: what is signed, by whom, and how it is damaged."""

from __future__ import annotations

import datetime
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from limner.images import MEDIA_TYPES, encode
from limner.trust.provenance import Ingredient, Signer
from tests.support.tiny import picture

FORMATS = ("PNG", "JPEG", "WEBP")
METADATA = {
    "prompt": "a cat ☂",
    "seed": 2**63 - 1,
    "references": ["ab"],
    "width": 64,
    "strength": 0.5,
    "lora": None,
    "sizes": [0, -6, 101, 83],
}


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
        builder.sign(native, MEDIA_TYPES[format.lower()], io.BytesIO(data), result)
    return result.getvalue()


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
