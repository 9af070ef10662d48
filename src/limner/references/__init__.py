"""References: K/V of reference pictures as values, their content keys, and the pack files that carry them elsewhere."""

from __future__ import annotations

from limner.references.key import CONTENT_KEY, check_key, reference_key
from limner.references.pack import LONGEST_HEADER, DamagedPack, PackIdentity, parse_identity, read_identity
from limner.references.value import References, position_ids

__all__ = [
    "CONTENT_KEY",
    "LONGEST_HEADER",
    "DamagedPack",
    "PackIdentity",
    "References",
    "check_key",
    "parse_identity",
    "position_ids",
    "read_identity",
    "reference_key",
]
