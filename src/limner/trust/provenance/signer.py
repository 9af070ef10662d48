"""The operator's certificate and key, read from files and checked.

What every reader of a manifest would refuse is refused here, before the first job. Knows nothing of manifests.
"""

from __future__ import annotations

import datetime
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.errors import InvalidRequest
from limner.trust.provenance.library import DEVELOPMENT_NAME, require

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["EMAIL_PROTECTION", "Signer"]

_logger = logging.getLogger("limner")

_ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
"""C2PA's name of the signature algorithm by elliptic curve."""
EMAIL_PROTECTION = "1.3.6.1.5.5.7.3.4"
"""Extended key usage for e-mail protection (RFC 5280)."""
_PURPOSES = ("1.3.6.1.4.1.62558.2.1", "1.3.6.1.5.5.7.3.36", EMAIL_PROTECTION)
"""Extended key usages of a C2PA claim signer: C2PA itself, document signing (RFC 9336), e-mail protection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """A certificate chain (PEM, the signing certificate first) and its private key (PEM, not encrypted).

    `timestamp_url` is a timestamp authority (RFC 3161). It is sent the digest of each picture, and the signature outlives
    the certificate. Without one nothing leaves the machine, and a manifest is valid as long as the certificate is.
    """

    certificates: bytes = field(repr=False)
    private_key: bytes = field(repr=False)
    algorithm: str
    common_name: str
    development: bool = False
    timestamp_url: str | None = None

    @classmethod
    def from_files(
        cls, certificate: str | os.PathLike[str], key: str | os.PathLike[str], *, timestamp_url: str | None = None
    ) -> Signer:
        """Read and check a chain and its key. Raises `InvalidRequest` that names the file and the problem."""
        require("cryptography", package="cryptography")
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        chain_pem, key_pem = _read(certificate, field="certificate"), _read(key, field="key")
        try:
            chain = x509.load_pem_x509_certificates(chain_pem)
        except ValueError as error:
            raise InvalidRequest("certificate", f"{certificate} is no chain of certificates in PEM ({error})") from None
        try:
            private = serialization.load_pem_private_key(key_pem, password=None)
        except TypeError:
            raise InvalidRequest(
                "key", f"{key} is encrypted; give it without a password, readable by you alone"
            ) from None
        except Exception as error:  # ValueError, UnsupportedAlgorithm
            raise InvalidRequest("key", f"{key} is no private key in PEM ({error})") from None
        leaf = chain[0]
        if leaf.public_key() != private.public_key():
            raise InvalidRequest(
                "key",
                f"{key} is not the key of the first certificate in {certificate}; put the signing certificate first",
            )
        _check_leaf(leaf, str(certificate))
        if os.name == "posix" and stat.S_IMODE(os.stat(key).st_mode) & 0o077:
            _logger.warning("%s can be read by others than its owner; chmod 600 it", key)
        name = _common_name(leaf)
        return cls(
            certificates=chain_pem,
            private_key=key_pem,
            algorithm=_algorithm(private, str(key)),
            common_name=name,
            development=name == DEVELOPMENT_NAME,
            timestamp_url=timestamp_url,
        )


def _read(path: str | os.PathLike[str], *, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(field, f"{path} cannot be read ({error.strerror}); give a PEM file") from error


def _common_name(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    return next((str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)), "")


def _check_leaf(leaf: x509.Certificate, shown: str) -> None:
    """Refuse a signing certificate that is out of date, self-signed or not for C2PA. Raises `InvalidRequest`."""
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise InvalidRequest(
            "certificate",
            f"{shown} is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}; "
            "give one that is valid now",
        )
    if leaf.issuer == leaf.subject:
        raise InvalidRequest(
            "certificate", f"{shown} is signed by itself, which C2PA does not allow; have it issued by a CA"
        )
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        purposes = {purpose.dotted_string for purpose in usage}
    except x509.ExtensionNotFound:
        purposes = set()
    if not purposes.intersection(_PURPOSES):
        raise InvalidRequest(
            "certificate",
            f"{shown} has no extended key usage for C2PA; it has to allow C2PA claim signing, document signing or "
            "e-mail protection",
        )


def _algorithm(private: Any, shown: str) -> str:
    """Return C2PA's name of the signature algorithm for a key. Raises `InvalidRequest`."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _ALGORITHMS:
        return _ALGORITHMS[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048:
        return "ps256"
    raise InvalidRequest(
        "key", f"{shown} is a key that C2PA does not take; use P-256, P-384, P-521, Ed25519 or RSA of 2048"
    )
