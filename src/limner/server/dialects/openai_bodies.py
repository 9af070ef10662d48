"""Bodies of /v1/images/edits: forms with files, and JSON with pictures by URL, data URL or base64.

Owns the names that clients give to pictures: `image`, `image[]` and `image[0]`, `url` and `url[]`, `images`. Decodes none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from limner.errors import InvalidRequest
from limner.server.dialects.control_fields import Expansion
from limner.server.dialects.openai_schemas import Edit, EditForm, Generation, ImageSource, NestedUrl
from limner.server.dialects.unknown_fields import told
from limner.server.http.pictures import SentPicture
from limner.server.http.wire import read_form
from limner.server.jobs.offload import Offload

__all__ = ["EditInputs", "read_edit"]

_PICTURE = re.compile(r"(?:images?|urls?)(?:\[([0-9]{0,3})\])?")
"""Fields of pictures, and the place that some clients write into the name."""
_PART = re.compile(r"(reference_weights|expand)\[(?:(expand|size|anchor|overlap)\](?:(\[)\])?|\])")
"""Fields in which clients spread a list or an object: reference_weights[], expand[size][], expand[anchor]."""
_LORA = re.compile(r"loras\[([^\[\]]{1,200})\]")
"""A strength, where clients spread the object over several fields: loras[style]."""
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,20})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class EditInputs:
    """A request as it was read: its fields, and its pictures in order."""

    fields: Generation
    pictures: tuple[SentPicture, ...] = ()
    mask: SentPicture | None = None
    canvas: SentPicture | None = None


async def read_edit(request: Request, *, max_picture_bytes: int, offload: Offload) -> EditInputs:
    """Read a form, or JSON. Raises `InvalidRequest` and `RequestValidationError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json"
    inputs = await (_read_json(request) if is_json else _read_form(request, max_picture_bytes, offload))
    if not inputs.pictures and inputs.fields.references is None and inputs.canvas is None:
        field = "images" if kind == "application/json" else "image"
        raise InvalidRequest(field, "is missing; send one or more pictures, or references with a handle")
    return inputs


async def _read_json(request: Request) -> EditInputs:
    try:
        fields = Edit.model_validate(await request.json())
    except json.JSONDecodeError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body", error.pos), "msg": f"JSON decode error: {error.msg}"}]
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(_path(first["loc"]) or "body", told(first, Edit)) from None
    pictures = [_source(one, field=f"images[{i}]") for i, one in enumerate(fields.images or ())]
    pictures += [*_texts(fields.image, field="image"), *_texts(fields.url, field="url")]
    mask, canvas = (
        None if one is None else _source(one, field=name)
        for name, one in (("mask", fields.mask), ("canvas", fields.canvas))
    )
    return EditInputs(fields=fields, pictures=tuple(pictures), mask=mask, canvas=canvas)


def _path(loc: Iterable[int | str]) -> str:
    """Return where an error is, as images[0].image_url: without the names that pydantic gives to kinds of values."""
    kinds = ("str", "list[str]", ImageSource.__name__, NestedUrl.__name__, Expansion.__name__)
    names = [part for part in loc if part not in kinds and not str(part).endswith(("]", ")", "float"))]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).removeprefix(".")


def _source(source: ImageSource | str, *, field: str) -> SentPicture:
    if isinstance(source, str):
        return SentPicture(field=field, data=source)
    if source.file_id is not None:
        raise InvalidRequest(
            f"{field}.file_id",
            "no files are kept under ids here; send image_url with a data URL, or references with a handle",
        )
    if source.text is None:
        raise InvalidRequest(f"{field}.image_url", "is missing; send a data URL")
    return SentPicture(field=f"{field}.image_url", data=source.text)


def _texts(value: str | list[str] | None, *, field: str) -> Iterator[SentPicture]:
    if isinstance(value, str):
        yield SentPicture(field=field, data=value)
    for i, text in enumerate(value if isinstance(value, list) else ()):
        yield SentPicture(field=f"{field}[{i}]", data=text)


async def _read_form(request: Request, max_picture_bytes: int, offload: Offload) -> EditInputs:
    values: dict[str, str] = {}
    parts: list[tuple[re.Match[str], str]] = []
    loras: dict[str, str] = {}
    pictures: list[SentPicture] = []
    single: dict[str, SentPicture] = {}
    async with read_form(request, max_fields=60, max_part=2 * max_picture_bytes + 1024) as form:
        for name, value in form.multi_items():
            is_file, is_picture = isinstance(value, UploadFile), _PICTURE.fullmatch(name)
            data: str | bytes = value if isinstance(value, str) else b""
            if isinstance(value, UploadFile):  # in a thread: copying megabytes takes a while
                data = await offload.run(value.file.read, max_picture_bytes + 1)
            if is_picture:
                pictures.append(SentPicture(field=name, data=data))
            elif name in ("mask", "canvas") and name not in single:
                single[name] = SentPicture(field=name, data=data)
            elif is_file and name not in single:
                raise InvalidRequest(
                    name, "is not a field for a file; pictures are image or image[], and mask and canvas are others"
                )
            elif name in values or name in single:
                raise InvalidRequest(name, "is there twice; give it once")
            elif part := _PART.fullmatch(name):
                parts.append((part, str(data)))
            elif (part := _LORA.fullmatch(name)) and part[1] not in loras:
                loras[part[1]] = str(data)
            else:
                values[name] = str(data)
    for name, text in {**_joined(parts), **({"loras": _strengths(loras)} if loras else {})}.items():
        if name in values:
            raise InvalidRequest(name, "is there twice; give it once")
        values[name] = text
    return EditInputs(fields=_validate(values), pictures=tuple(_in_order(pictures)), **single)


def _joined(parts: Iterable[tuple[re.Match[str], str]]) -> dict[str, str]:
    """Return values that clients spread over several fields as one text of JSON each."""
    found: dict[str, Any] = {}
    for part, text in parts:
        name, key, is_list = part[1], part[2], part[3] is not None
        value: Any = float(text) if _NUMBER.fullmatch(text) else text
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        if key is None:
            into, last = found.setdefault(name, []), None
        else:
            into, last = found.setdefault(name, {}), key
        if isinstance(into, dict) != (last is not None):
            raise InvalidRequest(part[0], f"is beside {name}[] or {name}[{key}] of another form; give one of them")
        if isinstance(into, list):
            into.append(value)
        elif is_list:
            into.setdefault(key, []).append(value)
        elif key in into:
            raise InvalidRequest(part[0], "is there twice; give it once")
        else:
            into[key] = value
    return {name: json.dumps(value) for name, value in found.items()}


def _strengths(loras: Mapping[str, str]) -> str:
    """Return strengths that clients spread over several fields as one text of JSON."""
    found: dict[str, Any] = {}
    for name, text in loras.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return json.dumps(found)


def _in_order(pictures: Iterable[SentPicture]) -> list[SentPicture]:
    """Return pictures by the places in their names, where all of one name have a place; else as they came."""
    pictures = list(pictures)
    places = [(found[1] or "") if (found := _PICTURE.fullmatch(one.field)) else "" for one in pictures]
    if not all(places) or len({one.field.partition("[")[0] for one in pictures}) > 1:
        return pictures
    for one in pictures:
        if sum(one.field == other.field for other in pictures) > 1:
            raise InvalidRequest(one.field, "is there twice; give each picture a place of its own")
    return [one for _, one in sorted(zip(map(int, places), pictures, strict=True), key=lambda pair: pair[0])]


def _validate(values: Mapping[str, str]) -> EditForm:
    try:
        return EditForm.model_validate_strings(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(_path(first["loc"]) or "body", told(first, EditForm)) from None
