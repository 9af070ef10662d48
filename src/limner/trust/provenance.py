"""Where a picture comes from: C2PA manifests, signed with the operator's certificate, and what a file tells of itself.

Owns the manifest that Limner writes, the certificate and key that sign it, and the reading of manifests and metadata.
Knows nothing of models or HTTP. Nothing here opens a connection unless a timestamp authority is given.
"""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from limner import __version__, images
from limner.errors import InvalidRequest, LimnerError, MissingExtra, OutputError

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Ingredient", "ProvenanceReport", "Signer", "development_credentials", "read", "sign"]

_logger = logging.getLogger("limner")

MIME_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_ASSERTION = "limner.generation"
_DEVELOPMENT = "Limner development certificate"
_CHAIN, _KEY, _ROOT = "certificate.pem", "key.pem", "root.pem"
_DEVELOPMENT_DAYS = 3650
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
# Purposes that a C2PA claim signer's certificate may have: C2PA itself, document signing (RFC 9336), e-mail protection.
_PURPOSES = ("1.3.6.1.4.1.62558.2.1", "1.3.6.1.5.5.7.3.36", "1.3.6.1.5.5.7.3.4")


def _settings(*, trust: bytes | None = None) -> dict[str, Any]:
    """Settings of the c2pa library.

    References and results are private, so no thumbnail of them goes into a manifest; nothing is fetched, whatever a file
    asks for; and what was signed is read back, so that a picture with a broken manifest is never given out.
    """
    return {
        "version": 1,
        "builder": {"thumbnail": {"enabled": False}},
        "trust": {"user_anchors": trust.decode("ascii", "replace")} if trust else {},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
    }


def _need(module: str, *, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtra("C2PA", package=package, extra="serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingredient:
    """A reference picture: the bytes of a PNG, JPEG or WebP file, and the name that the manifest gives it.

    The manifest keeps the name, the format and, if the file has one, the file's own manifest with all that it holds.
    Limner adds nothing of the pixels.
    """

    data: bytes = field(repr=False)
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """A certificate chain (PEM, the signing certificate first) and its private key (PEM, not encrypted).

    `timestamp_url` is a timestamp authority (RFC 3161) that is asked for each picture: its digest leaves the machine, and
    the signature outlives the certificate. Without one nothing leaves the machine, and a manifest is valid as long as the
    certificate is.
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
        """Reads and checks a chain and a key. Raises `InvalidRequest` that says what is wrong with which."""
        _need("cryptography", package="cryptography")
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
            development=name == _DEVELOPMENT,
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
    """Refuses before the first job what every reader of a manifest would refuse."""
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
    """The C2PA name of the signature algorithm for a key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048:
        return "ps256"
    raise InvalidRequest(
        "key", f"{shown} is a key that C2PA does not take; use P-256, P-384, P-521, Ed25519 or RSA of 2048"
    )


def development_credentials(folder: str | os.PathLike[str]) -> Signer:
    """The development certificate of a folder, made there if there is none; every manifest it signs says so.

    The folder gets certificate.pem (the chain), key.pem (mode 0600) and root.pem, which a reader may be told to trust;
    the root's key is not kept. Nobody trusts it otherwise: manifests validate as untrusted. Raises `OutputError`.
    """
    _need("cryptography", package="cryptography")
    folder = Path(folder)
    if not (folder / _CHAIN).exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".limner-", dir=folder.parent) as beside:
                made = Path(beside) / "made"
                made.mkdir(mode=0o700)
                _make_development(made)
                try:
                    os.rename(made, folder)  # whole, or lost to another process that was first
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
    """A root and a certificate that it issues, as the certificate profile of the C2PA specification wants them."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def name(common: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Limner development (not for production)"),
                x509.NameAttribute(NameOID.COMMON_NAME, common),
            ]
        )

    def usage(**on: bool) -> x509.KeyUsage:
        names = [
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ]
        return x509.KeyUsage(**{key: on.get(key, False) for key in names})

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)  # clocks differ
    root_name = name("Limner development root")

    def builder(subject: x509.Name, public: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=_DEVELOPMENT_DAYS))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )

    root = (
        builder(root_name, root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    leaf = (
        builder(name(_DEVELOPMENT), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(_PURPOSES[2])]), critical=False)
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


def sign(
    data: bytes,
    *,
    format: str,  # noqa: A002
    title: str,
    action: Literal["created", "edited"],
    ingredients: Sequence[Ingredient] = (),
    metadata: Mapping[str, Any] | None = None,
    signer: Signer,
) -> bytes:
    """The bytes of a picture file with a signed C2PA manifest in them; the pixels and metadata are those of `data`.

    "created" is a picture from text. "edited" has references: the first is the parent, the others are inputs of the
    model. `metadata` (what JSON can hold) becomes an assertion, which says too whether the certificate is for
    development. Raises `InvalidRequest`, `MissingExtra`, and `LimnerError` where signing fails: nothing half-signed
    comes out.
    """
    if format.upper() not in MIME_TYPES:
        raise InvalidRequest("format", f"{format!r} cannot be signed; use {', '.join(MIME_TYPES)}")
    if action not in ("created", "edited") or (action == "edited") != bool(ingredients):
        raise InvalidRequest(
            "action", f"{action!r} with {len(ingredients)} references; use 'edited' with references, 'created' without"
        )
    kinds = []
    for number, ingredient in enumerate(ingredients, start=1):
        kinds.append(_kind(ingredient.data))
        if kinds[-1] is None:
            raise InvalidRequest("ingredients", f"reference {number} is not a PNG, JPEG or WebP file; give its bytes")
    _need("c2pa", package="c2pa-python")
    import c2pa

    manifest = _manifest(title, action=action, ingredients=len(ingredients), metadata=metadata or {}, signer=signer)
    source, result = io.BytesIO(data), io.BytesIO()
    info = c2pa.C2paSignerInfo(
        alg=signer.algorithm, sign_cert=signer.certificates, private_key=signer.private_key, ta_url=signer.timestamp_url
    )
    try:
        with (
            c2pa.Context.from_dict(_settings()) as context,
            c2pa.Builder(manifest, context) as builder,
            c2pa.Signer.from_info(info) as native,
        ):
            for number, (ingredient, kind) in enumerate(zip(ingredients, kinds, strict=True), start=1):
                description = {
                    "title": ingredient.title,
                    "relationship": "parentOf" if number == 1 else "inputTo",
                    "label": f"reference-{number}",
                }
                try:
                    builder.add_ingredient(description, MIME_TYPES[str(kind)], io.BytesIO(ingredient.data))
                except c2pa.C2paError as error:  # stricter about files than what decoded the reference
                    _logger.info("reference %d has no part of its own in the manifest: %s", number, error)
                    again = images.encode(images.decode(ingredient.data, field=f"reference {number}"), "PNG")
                    builder.add_ingredient(description, MIME_TYPES["PNG"], io.BytesIO(again))
            builder.sign(native, MIME_TYPES[format.upper()], source, result)
    except c2pa.C2paError as error:
        raise LimnerError(
            f"C2PA: the picture could not be signed ({error}); check certificate, key, clock and timestamp authority"
        ) from error
    return result.getvalue()


def _manifest(
    title: str, *, action: str, ingredients: int, metadata: Mapping[str, Any], signer: Signer
) -> dict[str, Any]:
    agent = {"name": "Limner", "version": __version__}
    made: dict[str, Any] = {"action": f"c2pa.{action}", "softwareAgent": agent, "digitalSourceType": _SOURCE_TYPE}
    actions = [made]
    if ingredients:
        opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["reference-1"]}}
        made["parameters"] = {"ingredientIds": [f"reference-{i}" for i in range(1, ingredients + 1)]}
        actions = [opened, made]
    return {
        "claim_generator_info": [agent],
        "title": title,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": _ASSERTION, "data": {**metadata, "version": __version__, "development": signer.development}},
        ],
    }


def _kind(data: bytes) -> str | None:
    """The format of a picture file by its first bytes."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvenanceReport:
    """What a picture file tells of where it comes from.

    `metadata` is what Limner wrote beside the pixels, {} if nothing; anybody can change it in a file without a manifest.
    `state` is None without a manifest, else "Trusted", "Valid" (whole, by somebody whom no given certificate vouches
    for) or "Invalid". `remote` is where the file says that its manifest is kept; nothing is fetched from there.
    `ingredients` are the relationships of the references. `generation` is the signed metadata.
    """

    format: str
    metadata: dict[str, Any]
    state: Literal["Trusted", "Valid", "Invalid"] | None = None
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

    @property
    def whole(self) -> bool:
        """Nothing of what is there is damaged or was changed."""
        return not self.problems

    def describe(self) -> list[str]:
        """Lines for people."""
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in self.metadata.items())
        lines = [f"metadata: {shown or 'none of Limner'}"]
        if self.state is None:
            lines.append(
                f"C2PA: not in the file; kept at {self.remote}, not fetched" if self.remote else "C2PA: no manifest"
            )
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
        return ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]  # a file wrote them


_PROBLEMS = {
    "assertion.dataHash.mismatch": "the file was changed after it was signed",
    "assertion.hashedURI.mismatch": "the manifest was changed after it was signed",
    "claimSignature.mismatch": "the signature does not fit the manifest",
    "signingCredential.expired": "the certificate was not valid when it signed, or is no longer and there is no timestamp",
}
_UNTRUSTED = "signingCredential.untrusted"
_JUMBF = re.compile(rb"jumb.{4}jumd", re.DOTALL)  # how a manifest begins, whatever of it is damaged


def read(source: str | os.PathLike[str] | bytes, *, trust: bytes | None = None) -> ProvenanceReport:
    """What a picture file, or its bytes, tells: Limner's metadata and the C2PA manifest, checked.

    `trust` are root certificates (PEM) that vouch for signers. Raises `InvalidRequest` for what is no picture file and
    `MissingExtra`; a manifest or metadata that is damaged or changed is a problem in the report.
    """
    data, shown = _picture_bytes(source)
    kind = _kind(data)
    if kind is None:
        raise InvalidRequest("file", f"{shown} is not a PNG, JPEG or WebP picture; give one")
    damaged = f"{shown} is truncated or damaged; get it again"
    begun = _JUMBF.search(data) is not None
    problems: list[str] = []
    metadata: dict[str, Any] = {}
    try:
        metadata = images.read_metadata(data)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        if not begun:
            raise InvalidRequest("file", damaged) from None
        problems.append("the picture cannot be opened")
    except (ValueError, RecursionError):
        problems.append("Limner's metadata was changed and cannot be read")
    _need("c2pa", package="c2pa-python")
    import c2pa

    try:
        with c2pa.Context.from_dict(_settings(trust=trust)) as context:
            reader = c2pa.Reader.try_create(MIME_TYPES[kind], io.BytesIO(data), context=context)
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


def _picture_bytes(source: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, f"({len(source)} bytes)"
    path, shown = Path(source), images.printable(os.fspath(source))
    try:
        if path.exists() and not path.is_file():
            raise InvalidRequest("file", f"{shown} is not a file; give a picture file")
        if path.stat().st_size > images.MAX_FILE_BYTES:
            raise InvalidRequest("file", f"{shown} is over {images.MAX_FILE_BYTES} bytes, the most that is read")
        return path.read_bytes(), shown
    except OSError as error:
        raise InvalidRequest("file", f"{shown} cannot be read ({error.strerror}); give a picture file") from error
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest("file", f"{shown} is not a file name ({error})") from None


def _report(store: dict[str, Any], *, kind: str, metadata: dict[str, Any], problems: list[str]) -> ProvenanceReport:
    """The report on a manifest store as the c2pa library gives it: its active manifest, and what failed."""
    manifest = store["manifests"][store["active_manifest"]]
    results = store.get("validation_results", {})
    statuses = list(results.get("activeManifest", {}).get("failure", []))
    for delta in results.get("ingredientDeltas", []):
        statuses += delta.get("validationDeltas", {}).get("failure", [])
    for status in statuses:
        problem = _PROBLEMS.get(status["code"], f"{status['code']}: {status.get('explanation', '')}")
        if status["code"] != _UNTRUSTED and problem not in problems:
            problems.append(problem)
    state: Literal["Trusted", "Valid", "Invalid"] = "Invalid"
    if store.get("validation_state") in ("Trusted", "Valid"):
        state = store["validation_state"]
    else:
        problems = problems or ["the manifest is not valid"]
    actions: list[dict[str, Any]] = []
    generation: dict[str, Any] = {}
    for assertion in manifest.get("assertions", []):
        found = assertion.get("data")
        if assertion.get("label", "").startswith("c2pa.actions") and isinstance(found, dict):
            actions += found.get("actions", [])
        elif assertion.get("label") == _ASSERTION and isinstance(found, dict):
            generation = found
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
        development=info.get("common_name") == _DEVELOPMENT or generation.get("development") is True,
        actions=tuple(str(action.get("action", "")) for action in actions),
        source_type=", ".join(dict.fromkeys(sources)),
        ingredients=tuple(_relationship(ingredient) for ingredient in manifest.get("ingredients", [])),
        generation=generation,
        problems=tuple(problems),
    )


def _relationship(ingredient: dict[str, Any]) -> str:
    """As "inputTo", and whether what the reference told of itself was broken when it was taken in."""
    failures = ((ingredient.get("validation_results") or {}).get("activeManifest") or {}).get("failure") or []
    broken = any(failure.get("code") != _UNTRUSTED for failure in failures)
    return f"{ingredient.get('relationship', '')}{' (its own manifest is broken)' if broken else ''}"
