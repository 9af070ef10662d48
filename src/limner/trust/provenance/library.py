"""How Limner uses the c2pa library: its settings, and the names that writer and reader of manifests share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from limner.errors import MissingExtra

__all__ = ["ASSERTION", "DEVELOPMENT_NAME", "as_assertion", "has_c2pa", "of_assertion", "require", "settings"]

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


def as_assertion(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata (values of JSON) for an assertion: lists as their text, named in `lists`.

    The library takes a list of numbers for bytes when it reads a manifest, and gives something else back.
    """
    spelt = {name: json.dumps(value) for name, value in metadata.items() if isinstance(value, (list, tuple))}
    return {**metadata, **spelt, "lists": ", ".join(spelt)} if spelt else dict(metadata)


def of_assertion(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that `as_assertion` made an assertion of. What is no such text stays as it is."""
    found = dict(data)
    names = found.pop("lists", "")
    for name in names.split(", ") if isinstance(names, str) else ():
        try:
            found[name] = json.loads(found[name])
        except (KeyError, RecursionError, TypeError, ValueError):  # somebody else's assertion
            continue
    return found


def require(module: str, *, package: str) -> None:
    """Raise `MissingExtra` unless the module can be imported."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtra("C2PA", package=package, extra="serve")
