"""A certificate authority of its own, for tests of TLS."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import Any


class Authority:
    """A certificate authority and certificates of its own."""

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        self._x509, self._hash, self._new = x509, hashes.SHA256(), lambda: ec.generate_private_key(ec.SECP256R1())
        self._key = self._new()
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "limner tests")])
        self.certificate = self._issue(self._name, self._key, None, 1)

    def _issue(self, subject: Any, key: Any, host: str | None, days: int) -> Any:
        x509 = self._x509
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if host is None:
            usage = dict.fromkeys(
                (
                    "digital_signature",
                    "content_commitment",
                    "key_encipherment",
                    "data_encipherment",
                    "key_agreement",
                    "encipher_only",
                    "decipher_only",
                ),
                False,
            )
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(self._key, self._hash)

    def pem(self) -> str:
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.PEM).decode()

    def server_file(self, host: str, folder: Path, *, days: int = 1) -> Path:
        """A key and its chain in one file."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = self._new()
        subject = self._x509.Name([self._x509.NameAttribute(self._x509.NameOID.COMMON_NAME, host)])
        chain = folder / f"{host}.pem"
        chain.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + self._issue(subject, key, host, days).public_bytes(Encoding.PEM)
        )
        return chain

    def server_context(self, host: str, folder: Path, *, days: int = 1) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server_file(host, folder, days=days))
        return context
