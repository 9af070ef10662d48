"""Build a C2PA manifest and sign a picture file with it. Knows nothing of models or HTTP.

No connection is opened unless the signer has a timestamp authority.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from limner.errors import InvalidRequest, LimnerError
from limner.images import MEDIA_TYPES, decode, encode, format_of
from limner.trust.provenance.library import ASSERTION, as_assertion, require, settings
from limner.trust.provenance.signer import Signer
from limner.version import __version__

__all__ = ["Ingredient", "sign"]

_logger = logging.getLogger("limner")

_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_COMPOSED_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's word for inpainting and outpainting: a part of the pixels is the canvas'."""
_COMPOSED = ("mask", "preserve")
"""Names in the metadata of a picture that holds pixels of its first reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingredient:
    """A reference picture: the bytes of a PNG, JPEG or WebP file, and the name that the manifest gives it.

    The manifest holds the name, the format and, if the file has one, the file's own manifest with all its contents.
    Limner adds nothing of the pixels.
    """

    data: bytes = field(repr=False)
    title: str


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
    """Return the bytes of a picture file with a signed C2PA manifest in them; pixels and metadata are those of `data`.

    "created" is a picture from text. "edited" has references: the first is the parent, the others are inputs of the
    model; with a mask, or where the rest was left alone, it is a composite. `metadata` (values of JSON) becomes an
    assertion, which also says if the certificate is for development. Raises `InvalidRequest`, `MissingExtra`, and
    `LimnerError` if signing fails.
    """
    name = format.lower()
    if name not in MEDIA_TYPES:
        raise InvalidRequest("format", f"{format!r} cannot be signed; use {', '.join(MEDIA_TYPES).upper()}")
    if action not in ("created", "edited") or (action == "edited") != bool(ingredients):
        raise InvalidRequest(
            "action", f"{action!r} with {len(ingredients)} references; use 'edited' with references, 'created' without"
        )
    formats = [_format_of_reference(ingredient, number) for number, ingredient in enumerate(ingredients, start=1)]
    require("c2pa", package="c2pa-python")
    import c2pa

    manifest = _manifest(title, action=action, ingredients=len(ingredients), metadata=metadata or {}, signer=signer)
    source, result = io.BytesIO(data), io.BytesIO()
    info = c2pa.C2paSignerInfo(
        alg=signer.algorithm, sign_cert=signer.certificates, private_key=signer.private_key, ta_url=signer.timestamp_url
    )
    try:
        with (
            c2pa.Context.from_dict(settings()) as context,
            c2pa.Builder(manifest, context) as builder,
            c2pa.Signer.from_info(info) as native,
        ):
            for number, (ingredient, kind) in enumerate(zip(ingredients, formats, strict=True), start=1):
                _add_reference(builder, ingredient, kind, number)
            builder.sign(native, MEDIA_TYPES[name], source, result)
    except c2pa.C2paError as error:
        raise LimnerError(
            f"C2PA: the picture could not be signed ({error}); check certificate, key, clock and timestamp authority"
        ) from error
    return result.getvalue()


def _format_of_reference(ingredient: Ingredient, number: int) -> str:
    found = format_of(ingredient.data)
    if found is None:
        raise InvalidRequest("ingredients", f"reference {number} is not a PNG, JPEG or WebP file; give its bytes")
    return found


def _add_reference(builder: Any, ingredient: Ingredient, format: str, number: int) -> None:  # noqa: A002
    """Add a reference to a `c2pa.Builder`, decoded and encoded again if the library refuses the file."""
    import c2pa

    description = {
        "title": ingredient.title,
        "relationship": "parentOf" if number == 1 else "inputTo",
        "label": f"reference-{number}",
    }
    try:
        builder.add_ingredient(description, MEDIA_TYPES[format], io.BytesIO(ingredient.data))
    except c2pa.C2paError as error:  # it is stricter about files than Pillow, which decoded the reference
        _logger.info("reference %d: its own manifest is left out, the c2pa library refuses the file: %s", number, error)
        again = encode(decode(ingredient.data, field=f"reference {number}"), "PNG")
        builder.add_ingredient(description, MEDIA_TYPES["png"], io.BytesIO(again))


def _manifest(
    title: str, *, action: str, ingredients: int, metadata: Mapping[str, Any], signer: Signer
) -> dict[str, Any]:
    agent = {"name": "Limner", "version": __version__}
    source = _COMPOSED_TYPE if any(name in metadata for name in _COMPOSED) else _SOURCE_TYPE
    made: dict[str, Any] = {"action": f"c2pa.{action}", "softwareAgent": agent, "digitalSourceType": source}
    actions = [made]
    if ingredients:
        opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["reference-1"]}}
        made["parameters"] = {"ingredientIds": [f"reference-{i}" for i in range(1, ingredients + 1)]}
        actions = [opened, made]
    about = {**as_assertion(metadata), "version": __version__, "development": signer.development}
    return {
        "claim_generator_info": [agent],
        "title": title,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}, {"label": ASSERTION, "data": about}],
    }
