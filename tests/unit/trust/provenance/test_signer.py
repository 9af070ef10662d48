"""The certificates and keys of operators."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.support.provenance import made, operator

from limner import InvalidRequest
from limner.trust.provenance import Signer, read, sign


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
