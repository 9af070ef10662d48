"""JSON of a request body: read strictly, in time and memory that follow its size. Knows no requests and no schema.

Python's parser holds all threads of the process while it works. So long texts, which are pictures, are lifted out and
read in slices, and the rest is small. Each step takes milliseconds, and other threads go on between steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from limner.errors import InvalidRequest

__all__ = ["MAX_PARTS", "read_json"]

MAX_PARTS = 1_000
"""Most brackets, braces and commas outside of texts. The largest request of any dialect has under 50."""
_MAX_NAME = 1_000
_LONG = 64 << 10
"""Texts of more bytes are lifted out."""
_MAX_REST = 4 << 20
"""Most bytes of a body without its long texts."""
_SLICE = 512 << 10
"""Bytes that are read at once: more than a prompt of 32,000 characters has, even if all of them are escaped."""
_STANDS_FOR_TEXT = b" NaN "
_INSIDE = re.compile(rb'(?:[^"\\]++|\\u[0-9A-Fa-f]{4}|\\[^u])*+')
_NO_NUMBER = re.compile(rb"-?(?:NaN|Infinity)")


def read_json(body: bytes, *, max_text: int) -> object:
    """Return the value of a body in UTF-8, none of whose texts has more than `max_text` bytes.

    Raises `JSONDecodeError` for what is no JSON, and `InvalidRequest` for JSON that parsers read differently (a name that
    is there twice, NaN) or that takes too much to read.
    """
    try:
        rest, texts = _lift(body, max_text)
        lifted = iter(texts)
        value: object = json.loads(rest.decode(), object_pairs_hook=_once, parse_constant=lambda _: next(lifted))
        return value
    except (json.JSONDecodeError, InvalidRequest):
        raise
    except RecursionError:
        raise InvalidRequest("body", "is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest("body", str(error)) from None


def _lift(body: bytes, max_text: int) -> tuple[bytes, list[str]]:
    """Return a body with `_STANDS_FOR_TEXT` in place of its long texts, and these texts in their order."""
    rest: list[bytes] = []
    texts: list[str] = []
    num_parts = size = at = 0
    while at < len(body):
        quote = body.find(b'"', at)
        start = len(body) if quote < 0 else quote
        size = _check_rest(size + start - at)
        gap = body[at:start]
        wrong = _NO_NUMBER.search(gap)
        if wrong is not None:
            raise InvalidRequest("body", f"{wrong[0].decode()} is not JSON; give a number")
        num_parts += sum(map(gap.count, (b"[", b"{", b",")))
        if num_parts > MAX_PARTS or len(rest) > 4 * MAX_PARTS + 4:  # a part has a name and a value at most
            raise InvalidRequest("body", f"has over {MAX_PARTS} lists, objects and values; send fewer")
        rest.append(gap)
        if quote < 0:
            break
        slices = list(_slices(body, start + 1, max_text))
        at = start + 1 + sum(map(len, slices)) + 1
        if at - start > _LONG:
            rest.append(_STANDS_FOR_TEXT)
            texts.append(_text(slices))
        else:
            size = _check_rest(size + at - start)
            rest.append(body[start:at])
    return b"".join(rest), texts


def _check_rest(size: int) -> int:
    if size > _MAX_REST:
        raise InvalidRequest(
            "body", f"has over {_MAX_REST} bytes beside long texts; leave out spaces and unknown fields"
        )
    return size


def _slices(body: bytes, start: int, max_text: int) -> Iterator[bytes]:
    """Yield what is between the quotes of a text that begins at `start`, never a part of an escaped character."""
    at = start
    while True:
        end = min(at + _SLICE, len(body))
        quote = body.find(b'"', at, end)
        stop = end if quote < 0 else quote
        if (
            body.find(b"\\", at, stop) >= 0
        ):  # else there is nothing to look at: a picture, found a hundred times as fast
            stop = _INSIDE.match(body, at, end).end()  # type: ignore[union-attr]  # it matches nothing at least
        if stop - start > max_text:
            raise InvalidRequest(
                "body", f"a text has over the {max_text} bytes that are allowed; send a smaller picture"
            )
        if stop < end and body[stop] == ord('"'):
            yield body[at:stop]
            return
        if end == len(body) or stop == at:
            raise json.JSONDecodeError("Unterminated string or invalid escape", "", 0)
        yield body[at:stop]
        at = stop


def _text(slices: list[bytes]) -> str:
    """Return a long text. One of several slices is a picture: with characters beyond ASCII it is none."""
    found = [json.loads(f'"{part.decode()}"') for part in slices if len(slices) == 1 or part.isascii()]
    if len(found) != len(slices) or (len(slices) > 1 and not all(part.isascii() for part in found)):
        raise InvalidRequest("body", "a text of over a megabyte is no base64; no field takes another text of that size")
    return "".join(found)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if len(name) > _MAX_NAME:
            raise InvalidRequest("body", f"a name has {len(name)} characters; at most {_MAX_NAME} are allowed")
        if name in found:
            raise InvalidRequest("body", f"the name {name[:80]!r} is there twice; give it once")
        found[name] = value
    return found
