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
from limner.spelling import meant

__all__ = ["MAX_MANIFEST_BYTES", "BrokenRow", "Row", "check_number", "read_manifest", "seed_of"]

MAX_MANIFEST_BYTES = 256 << 20
"""Larger manifests are not read."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_EXAMPLE = '{"id": "cat-1", "prompt": "..."}'
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
    _check_form(lines, path=path)
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
        id = None if values.get("id") is None else _id(values["id"])
        for name in values:
            if name not in _FIELDS:
                hint = f"did you mean {near}? " if (near := meant(name, _FIELDS)) else ""
                raise InvalidRequest(name[:40], f"is not a field of a row; {hint}allowed: {', '.join(_FIELDS)}")
        if id is None:
            raise InvalidRequest(
                "id", 'is missing; give each row another one, as "cat-1": it names the file of the picture'
            )
        if values.get("prompt") is None:
            raise InvalidRequest("prompt", "is missing; say what to draw or to change")
        check_prompt(values["prompt"])
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
    except json.JSONDecodeError as error:
        problem = f"is not one JSON object in UTF-8 ({error.msg} at character {error.pos + 1})"
        raise InvalidRequest("row", f"{problem}; {_remedy(data)}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("row", f"is not one JSON object in UTF-8 ({error}); correct the line") from None
    if not isinstance(values, dict):
        kind = {list: "list", str: "text", bool: "truth value", type(None): "null"}.get(type(values), "number")
        raise InvalidRequest("row", f"is a JSON {kind}, not an object; write {_EXAMPLE}")
    return values


def _remedy(data: bytes) -> str:
    """Return what to do about a line that is no JSON."""
    line = data.strip()
    if line.startswith(b"{") and line.endswith(b"},"):
        return "leave out the comma at its end: each line is an object by itself"
    if re.search(rb",\s*[}\]]", line):
        return "leave out the comma before the closing bracket"
    if re.match(rb"\{\s*'", line):
        return 'JSON has double quotes: "'
    if any(quote.encode() in line for quote in "\u201c\u201d\u201e"):
        return 'it has quotes of typography; JSON has plain ones: "'
    return "correct the line" if line.startswith(b"{") else f"write {_EXAMPLE}"


def _check_form(lines: list[bytes], *, path: str | os.PathLike[str]) -> None:
    """Refuse a file that has rows in another form than JSON lines. Raises `InvalidRequest`."""
    start = next((line.strip() for line in lines if line.strip()), b"")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InvalidRequest("manifest", f"{path} is UTF-16; save it as UTF-8")
    if b"\0" in start or b"\x89PNG" in start:
        raise InvalidRequest("manifest", f"{path} is no text; give a file of JSON lines, as {_EXAMPLE}")
    start = start.removeprefix(b"\xef\xbb\xbf")
    if start[:1] == b"[" or start == b"{":
        try:
            whole = json.loads(b"\n".join(lines).decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return
        if isinstance(whole, dict):
            raise InvalidRequest(
                "manifest", f"{path} is one JSON object over several lines; write each row on one line"
            )
        if all(isinstance(row, dict) for row in whole):
            raise InvalidRequest(
                "manifest",
                f"{path} is one JSON list of {len(whole)} rows; write a row a line, as with: jq -c '.[]' FILE > rows.jsonl",
            )
    names = [name.strip(b" \"'").lower() for name in re.split(rb"[,;\t]", start)]
    if len(names) > 1 and names[0] in (b"id", b"prompt", b"references", b"seed"):
        raise InvalidRequest("manifest", f"{path} is a table (CSV), not JSON lines; write each row as {_EXAMPLE}")


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
        meant_so = f', as ["{value}"]' if isinstance(value, str) and len(value) <= 80 else ""
        raise InvalidRequest("references", f"{_short(value)} is not a list of file names{meant_so}")
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
