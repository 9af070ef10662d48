"""How Limner uses the c2pa library: its settings, and the names that writer and reader of manifests share."""

from __future__ import annotations

import importlib.util
from typing import Any

from limner.errors import MissingExtra

__all__ = ["ASSERTION", "DEVELOPMENT_NAME", "has_c2pa", "require", "settings"]

ASSERTION = "limner.generation"
"""Label of the assertion with a picture's metadata."""
DEVELOPMENT_NAME = "Limner development certificate"
"""Common name of certificates that are for development only."""


def settings(*, trust: bytes | None = None) -> dict[str, Any]:
    """Return the settings of the c2pa library; `trust` are root certificates in PEM that vouch for signers.

    References and results are private, so no thumbnail of them goes into a manifest. Nothing is fetched, whatever a file
    asks for. What was signed is read back, so that a picture with a broken manifest is never delivered.
    """
    return {
        "version": 1,
        "builder": {"thumbnail": {"enabled": False}},
        "trust": {"user_anchors": trust.decode("ascii", "replace")} if trust else {},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
    }


def has_c2pa() -> bool:
    """Return True if the c2pa library is installed."""
    return importlib.util.find_spec("c2pa") is not None


def require(module: str, *, package: str) -> None:
    """Raise `MissingExtra` unless the module can be imported."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtra("C2PA", package=package, extra="serve")
