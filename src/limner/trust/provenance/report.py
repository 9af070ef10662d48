"""Read where a picture file says it comes from: Limner's metadata, and its C2PA manifest, checked.

Knows nothing of models or HTTP. Nothing is fetched, whatever the file names.
"""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from limner.errors import InvalidRequest
from limner.images import MEDIA_TYPES, format_of, read_metadata
from limner.images.decode import describe_source, read_file
from limner.trust.provenance.library import ASSERTION, DEVELOPMENT_NAME, has_c2pa, of_assertion, require, settings

__all__ = ["ProvenanceReport", "State", "read"]

State = Literal["Trusted", "Valid", "Invalid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvenanceReport:
    """Where a picture file says that it comes from.

    `metadata` is Limner's, {} if there is none; in a file without a manifest anybody can change it. `state` is None
    without a manifest, else "Trusted", "Valid" (unchanged, but no given certificate vouches for the signer) or
    "Invalid". `remote` is the URL of a manifest that is not in the file; nothing is fetched from there. `ingredients`
    are the relationships of the references. `generation` is the signed metadata. `checked` is False where the c2pa
    library is not installed: there is no manifest in the file then, and one kept elsewhere would not be found.
    """

    format: str
    metadata: dict[str, Any]
    state: State | None = None
    remote: str = ""
    title: str = ""
    generator: str = ""
    signed_by: str = ""
    issuer: str = ""
    signed_at: str = ""
    development: bool = False
    actions: tuple[str, ...] = ()
    source_type: str = ""
    ingredients: tuple[str, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    checked: bool = True

    @property
    def whole(self) -> bool:
        """True if nothing in the file is damaged or was changed."""
        return not self.problems

    def describe(self) -> list[str]:
        """Return the report as lines of text."""
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in self.metadata.items())
        lines = [f"metadata: {shown or 'none of Limner'}"]
        if self.state is None:
            text = (
                "no manifest" if self.checked else "no manifest in the file; pip install c2pa-python to look for more"
            )
            lines.append(f"C2PA: {f'not in the file; kept at {self.remote}, not fetched' if self.remote else text}")
        else:
            word = {"Trusted": "whole, trusted", "Valid": "whole, untrusted", "Invalid": "broken"}[self.state]
            signer = ", ".join(part for part in (self.signed_by, self.issuer, self.signed_at) if part)
            mark = "; for development only, proves nothing of who made it" if self.development else ""
            lines.append(f"C2PA: {word}; signed by {signer or 'nobody'}{mark}")
            lines.append(f"actions: {', '.join(self.actions) or 'none'}; {self.source_type or 'no source type'}")
            lines.append(f"generator: {self.generator or 'not named'}")
            lines.append(
                f"ingredients: {len(self.ingredients)}"
                + (f" ({', '.join(self.ingredients)})" if self.ingredients else "")
            )
        lines += [f"problem: {problem}" for problem in self.problems]
        return ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]  # no control characters


_PROBLEMS = {
    "assertion.dataHash.mismatch": "the file was changed after it was signed",
    "assertion.hashedURI.mismatch": "the manifest was changed after it was signed",
    "claimSignature.mismatch": "the signature does not fit the manifest",
    "signingCredential.expired": "the certificate was not valid when it signed, or is no longer and there is no timestamp",
}
"""Texts for status codes of the C2PA specification; other codes are shown as they are."""
_UNTRUSTED = "signingCredential.untrusted"
_JUMBF = re.compile(rb"jumb.{4}jumd", re.DOTALL)
"""The first bytes of a manifest: a damaged one is found by them."""


def read(source: str | os.PathLike[str] | bytes, *, trust: bytes | None = None) -> ProvenanceReport:
    """Report Limner's metadata and the checked C2PA manifest of a picture file or its bytes.

    `trust` are root certificates (PEM) that vouch for signers. Raises `InvalidRequest` for anything but a picture file,
    and `MissingExtra` where there is a manifest and the c2pa library is not installed. A manifest or metadata that is
    damaged or was changed is a problem in the report.
    """
    shown = describe_source(source)
    data = source if isinstance(source, bytes) else read_file(source, field="file", too_large=", the most that is read")
    name = format_of(data)
    if name is None:
        raise InvalidRequest("file", f"{shown} is not a PNG, JPEG or WebP picture; give one")
    kind = name.upper()
    damaged = f"{shown} is truncated or damaged; get it again"
    begun = _JUMBF.search(data) is not None
    problems: list[str] = []
    metadata: dict[str, Any] = {}
    try:
        metadata = read_metadata(data)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        if not begun:
            raise InvalidRequest("file", damaged) from None
        problems.append("the picture cannot be opened")
    except (ValueError, RecursionError):
        problems.append("Limner's metadata was changed and cannot be read")
    if not begun and not has_c2pa():
        return ProvenanceReport(format=kind, metadata=metadata, checked=False, problems=tuple(problems))
    require("c2pa", package="c2pa-python")
    import c2pa

    try:
        with c2pa.Context.from_dict(settings(trust=trust)) as context:
            reader = c2pa.Reader.try_create(MEDIA_TYPES[name], io.BytesIO(data), context=context)
            if reader is not None:
                with reader:
                    store = json.loads(reader.json())
                return _report(store, kind=kind, metadata=metadata, problems=problems)
        unread = "it is not found, though a part of it is there"
    except (c2pa.C2paError, ValueError, RecursionError) as error:
        elsewhere = re.search(r"^Remote: .*?(https?://\S+)", str(error))
        if elsewhere:
            return ProvenanceReport(format=kind, metadata=metadata, remote=elsewhere[1], problems=tuple(problems))
        if not begun:
            raise InvalidRequest("file", damaged) from None
        unread = str(error)
    if begun:
        problems.append(f"the manifest cannot be read ({unread})")
    return ProvenanceReport(
        format=kind, metadata=metadata, state="Invalid" if begun else None, problems=tuple(problems)
    )


def _report(store: dict[str, Any], *, kind: str, metadata: dict[str, Any], problems: list[str]) -> ProvenanceReport:
    """Build the report from a manifest store, as the c2pa library gives it: the active manifest, and every failure."""
    manifest = store["manifests"][store["active_manifest"]]
    problems = _with_failures(store, problems)
    state: State = "Invalid"
    if store.get("validation_state") in ("Trusted", "Valid"):
        state = store["validation_state"]
    else:
        problems = problems or ["the manifest is not valid"]
    actions, generation = _assertions(manifest)
    info = manifest.get("signature_info") or {}
    generators = [
        f"{g.get('name', '')} {g.get('version', '')}".strip() for g in manifest.get("claim_generator_info") or []
    ]
    sources = [str(a["digitalSourceType"]).rsplit("/", 1)[-1] for a in actions if a.get("digitalSourceType")]
    return ProvenanceReport(
        format=kind,
        metadata=metadata,
        state=state,
        title=str(manifest.get("title") or ""),
        generator=", ".join(generators),
        signed_by=str(info.get("common_name") or ""),
        issuer=str(info.get("issuer") or ""),
        signed_at=str(info.get("time") or ""),
        development=info.get("common_name") == DEVELOPMENT_NAME or generation.get("development") is True,
        actions=tuple(str(action.get("action", "")) for action in actions),
        source_type=", ".join(dict.fromkeys(sources)),
        ingredients=tuple(_relationship(ingredient) for ingredient in manifest.get("ingredients", [])),
        generation=generation,
        problems=tuple(problems),
    )


def _with_failures(store: dict[str, Any], problems: list[str]) -> list[str]:
    """Return the problems and the failures of a manifest store, each once."""
    results = store.get("validation_results", {})
    statuses = list(results.get("activeManifest", {}).get("failure", []))
    for delta in results.get("ingredientDeltas", []):
        statuses += delta.get("validationDeltas", {}).get("failure", [])
    found = list(problems)
    for status in statuses:
        problem = _PROBLEMS.get(status["code"], f"{status['code']}: {status.get('explanation', '')}")
        if status["code"] != _UNTRUSTED and problem not in found:
            found.append(problem)
    return found


def _assertions(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the actions of a manifest, and Limner's own assertion ({} if it has none)."""
    actions: list[dict[str, Any]] = []
    generation: dict[str, Any] = {}
    for assertion in manifest.get("assertions", []):
        found = assertion.get("data")
        if assertion.get("label", "").startswith("c2pa.actions") and isinstance(found, dict):
            actions += found.get("actions", [])
        elif assertion.get("label") == ASSERTION and isinstance(found, dict):
            generation = of_assertion(found)
    return actions, generation


def _relationship(ingredient: dict[str, Any]) -> str:
    """Return the relationship, such as "inputTo", and a note if the reference's own manifest was broken at signing."""
    failures = ((ingredient.get("validation_results") or {}).get("activeManifest") or {}).get("failure") or []
    broken = any(failure.get("code") != _UNTRUSTED for failure in failures)
    return f"{ingredient.get('relationship', '')}{' (its own manifest is broken)' if broken else ''}"
