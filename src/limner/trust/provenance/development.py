"""A certificate for development, made on this machine. It says in every manifest that it proves nothing.

Knows nothing of manifests.
"""

from __future__ import annotations

import datetime
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.errors import InvalidRequest, OutputError
from limner.trust.provenance.library import DEVELOPMENT_NAME, require
from limner.trust.provenance.signer import EMAIL_PROTECTION, Signer

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["development_credentials"]

_logger = logging.getLogger("limner")

_CHAIN, _KEY, _ROOT = "certificate.pem", "key.pem", "root.pem"
_VALID_DAYS = 3650
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def development_credentials(folder: str | os.PathLike[str]) -> Signer:
    """Return the development certificate of a folder; make one there first if there is none.

    The folder then holds certificate.pem (the chain), key.pem (mode 0600) and root.pem. The root's key is not stored.
    Every manifest that the certificate signs says that it is for development. Readers report it as untrusted unless they
    are given root.pem. Raises `InvalidRequest` and `OutputError`.
    """
    require("cryptography", package="cryptography")
    folder = Path(folder)
    if not (folder / _CHAIN).exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".limner-", dir=folder.parent) as temporary:
                made = Path(temporary) / "made"
                made.mkdir(mode=0o700)
                _make_development(made)
                try:
                    os.rename(made, folder)  # fails if another process made the folder first
                except OSError:
                    if not (folder / _CHAIN).exists():
                        raise
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made ({error.strerror or error}); give a new or empty folder that you may write"
            ) from error
        _logger.warning("made a development certificate in %s; nobody else trusts it", folder)
    signer = Signer.from_files(folder / _CHAIN, folder / _KEY)
    if not signer.development:
        raise InvalidRequest(
            "folder",
            f"{folder} holds the certificate of {signer.common_name!r}, none for development; give another folder",
        )
    return signer


def _make_development(folder: Path) -> None:
    """Write a root and a certificate that it issues, by the certificate profile of the C2PA specification."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)  # clocks differ
    root_name = _name("Limner development root")

    def builder(subject: x509.Name, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=_VALID_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )

    root = (
        builder(root_name, root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        builder(_name(DEVELOPMENT_NAME), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(EMAIL_PROTECTION)]), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    root_pem, leaf_pem = (c.public_bytes(serialization.Encoding.PEM) for c in (root, leaf))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(os.open(folder / _KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    (folder / _ROOT).write_bytes(root_pem)
    (folder / _CHAIN).write_bytes(leaf_pem + root_pem)


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Limner development (not for production)"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _key_usage(*allowed: str) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(**{usage: usage in allowed for usage in _KEY_USAGES})
