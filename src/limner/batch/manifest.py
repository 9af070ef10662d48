"""A manifest of many images: JSON lines, one row each, every field checked.

Owns what a row may say. A line that is not a row is an error of that row alone. Knows nothing of results, or of how rows
are drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from limner.batch.control import read_control, renamed
from limner.config import FITS
from limner.errors import InvalidRequest
from limner.grid import check_size
from limner.requests import CONTROL_FIELDS, check_guidance, check_length, check_prompt
from limner.schedule import MAX_STEPS

__all__ = ["MAX_MANIFEST_BYTES", "BrokenRow", "Row", "check_number", "read_manifest", "seed_of"]

MAX_MANIFEST_BYTES = 256 << 20
"""Larger manifests are not read."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_FIELDS = ("id", "prompt", "references", "seed", "size", "steps", "guidance", "negative_prompt", "fit", *CONTROL_FIELDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it stands in the manifest. `references` are files, relative to the manifest; `size` is (width, height).

    `fit` None: as the run does. `control` are those of `CONTROL_FIELDS`, as they stand there.
    """

    line: int
    id: str
    prompt: str
    references: tuple[str, ...] = ()
    seed: int
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    fit: str | None = None
    control: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenRow:
    """A line that is not a row, and why; `id` if it has one that can be used."""

    line: int
    id: str | None
    error: InvalidRequest


def read_manifest(path: str | os.PathLike[str]) -> list[Row | BrokenRow]:
    """Return the rows of a manifest, in order, without empty lines. Raises `InvalidRequest` for the file as a whole."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_MANIFEST_BYTES:
                raise InvalidRequest("manifest", f"{path} is over {MAX_MANIFEST_BYTES} bytes; split it")
            lines = file.read().split(b"\n")
    except OSError as error:
        raise InvalidRequest(
            "manifest", f"{path} cannot be read ({error.strerror or error}); give a file of JSON lines"
        ) from error
    except ValueError as error:
        raise InvalidRequest("manifest", f"{path!r} is not a file name ({error})") from None
    rows: list[Row | BrokenRow] = []
    first: dict[str, int] = {}
    for number, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        row = _read_row(data, line=number)
        if row.id is not None and first.setdefault(row.id.casefold(), number) != number:
            problem = (
                f"{row.id!r} is also the id of line {first[row.id.casefold()]} (case does not count); give another"
            )
            row = BrokenRow(line=number, id=None, error=InvalidRequest("id", problem))
        rows.append(row)
    if not rows:
        raise InvalidRequest("manifest", f"{path} has no rows; write one JSON object a line")
    return rows


def _read_row(data: bytes, *, line: int) -> Row | BrokenRow:
    id: str | None = None
    try:
        values = _object(data)
        id = _id(values.get("id"))
        for name in values:
            if name not in _FIELDS:
                raise InvalidRequest(name[:40], f"is not a field of a row; allowed: {', '.join(_FIELDS)}")
        check_prompt(values.get("prompt", ""))
        seed = values.get("seed")
        return Row(
            line=line,
            id=id,
            prompt=values["prompt"],
            references=_files(values.get("references", [])),
            seed=seed_of(id) if seed is None else check_number("seed", seed, low=0, high=2**63 - 1),
            size=_size(values.get("size")),
            steps=_optional_steps(values.get("steps")),
            guidance=_guidance(values.get("guidance")),
            negative_prompt=_negative(values.get("negative_prompt")),
            fit=_fit(values.get("fit")),
            control=read_control(values),
        )
    except InvalidRequest as error:
        return BrokenRow(line=line, id=id, error=renamed(error))


def _object(data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a name stands twice in an object")
        return dict(pairs)

    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("row", f"is not one JSON object in UTF-8 ({error}); correct the line") from None
    if not isinstance(values, dict):
        raise InvalidRequest("row", f"is a JSON {type(values).__name__}, not an object; write {{...}}")
    return values


def _id(value: object) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise InvalidRequest(
            "id",
            f"{_short(value)} is not a text of 1 to 200 letters, digits, '.', '_' or '-' that starts with one of "
            "the first two; it names the file of the picture",
        )
    return value


def _files(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise InvalidRequest("references", f"{_short(value)} is not a list of file names")
    for name in value:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequest("references", f"{name!r} is not valid Unicode; write it as UTF-8") from None
    return tuple(value)


def _size(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise InvalidRequest("size", f'{_short(value)} is not "WIDTHxHEIGHT", as "512x512"')
    return check_size("width", int(match[1])), check_size("height", int(match[2]))


def _optional_steps(value: object) -> int | None:
    return None if value is None else check_number("steps", value, low=1, high=MAX_STEPS)


def _guidance(value: Any) -> float | None:
    check_guidance(value)
    return None if value is None else float(value)


def _negative(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest("negative_prompt", f"{_short(value)} is not a text")
    check_length("negative_prompt", value)
    return value


def _fit(value: object) -> str | None:
    if value is not None and value not in FITS:
        raise InvalidRequest("fit", f"{_short(value)} is not one of {', '.join(FITS)}")
    return None if value is None else str(value)


def check_number(name: str, value: object, *, low: int, high: int) -> int:
    """Return a whole number within bounds. Raises `InvalidRequest`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(name, f"{_short(value)} is not a whole number from {low} to {high}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def seed_of(id: str) -> int:
    """Return the seed of a row that gives none: always the same for an id."""
    return int.from_bytes(hashlib.sha256(f"limner batch {id}".encode()).digest()[:8], "big") % 2**31
