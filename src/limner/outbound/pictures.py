"""Pictures of a request: base64, data URLs and, if an operator allows it, URLs.

Owns the text forms of a picture and which redirects are followed. Gives the bytes of a file. Does not decode them
(`images` does) and does not check addresses (`client` does).
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator
from urllib.parse import urljoin

from limner.errors import InvalidRequest, RemoteError
from limner.outbound.client import OutboundClient

__all__ = ["MAX_REDIRECTS", "decode_picture", "fetch_picture", "is_url", "read_picture"]

MAX_REDIRECTS = 3
"""Longer chains are loops or traps."""
_ACCEPT = {"Accept": "image/png, image/jpeg, image/webp"}
_REDIRECTS = (301, 302, 303, 307, 308)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}:")  # base64 has no colon
_DATA = re.compile(r"data:(?:image/[a-z0-9.+-]{1,64})?;base64,", re.IGNORECASE)
_SLICE = 256 << 10
_WHITESPACE = b" \t\r\n"
_NOT_BASE64 = "is not base64: A-Z a-z 0-9 + / and = at the end, spaces and line breaks between them"


def is_url(text: str) -> bool:
    """Whether a picture is named by a URL, and not sent as base64 or a data URL."""
    found = _SCHEME.match(text)
    return found is not None and found[0].lower() != "data:"


async def read_picture(
    text: str, *, client: OutboundClient | None, max_bytes: int, field: str = "input_image"
) -> bytes:
    """Return the bytes of a picture given as base64, data URL or URL. Without `client`, URLs are refused."""
    if not is_url(text):
        return decode_picture(text, max_bytes=max_bytes, field=field)
    if client is None:
        raise InvalidRequest(field, "pictures by URL are switched off on this server; send the file as base64")
    return await fetch_picture(text, client=client, max_bytes=max_bytes, field=field)


def decode_picture(text: str, *, max_bytes: int, field: str = "input_image") -> bytes:
    """Decode base64 (RFC 4648, section 4: + and /, padded), plain or in a data URL of an image.

    Spaces and line breaks are allowed, since many tools break lines; other characters are refused. The size is computed
    from the text (three bytes for four characters) and checked before anything is decoded. Raises `InvalidRequest`.
    """
    if text[:5].lower() == "data:":
        found = _DATA.match(text)
        if found is None:
            raise InvalidRequest(field, "the data URL is not data:image/<type>;base64,<data>")
        text = text[found.end() :]
    try:
        pieces = [text[at : at + _SLICE].encode("ascii") for at in range(0, len(text), _SLICE)]
    except UnicodeEncodeError:
        raise InvalidRequest(field, _NOT_BASE64) from None
    pieces = [piece.translate(None, _WHITESPACE) for piece in pieces]
    length = sum(map(len, pieces))
    if not length:
        raise InvalidRequest(field, "is empty; send a PNG, JPEG or WebP file as base64")
    if length % 4:
        raise InvalidRequest(field, f"has {length} characters of base64, which is no multiple of 4; is it complete?")
    end = b"".join(piece[-2:] for piece in pieces)[-2:]
    size = length // 4 * 3 - end.count(b"=")
    if size > max_bytes:
        raise InvalidRequest(field, f"the file has {size} bytes; at most {max_bytes} are allowed")
    try:
        return b"".join(_decoded(pieces))
    except binascii.Error:
        raise InvalidRequest(field, _NOT_BASE64) from None


def _decoded(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Decode base64 in slices of whole groups of four: each holds all threads of the process while it is decoded."""
    rest, is_over = b"", False
    for piece in pieces:
        text = rest + piece
        whole = len(text) // 4 * 4
        if is_over and text:  # a padded group in the middle would pass
            raise binascii.Error("= is not at the end")
        is_over = text[:whole].endswith(b"=")
        yield binascii.a2b_base64(text[:whole], strict_mode=True)
        rest = text[whole:]


async def fetch_picture(
    url: str,
    *,
    client: OutboundClient,
    max_bytes: int,
    field: str = "input_image",
    instead: str = "send the file as base64",
) -> bytes:
    """Fetch the file at a URL.

    At most `MAX_REDIRECTS` redirects are followed, each checked like the first URL, and never to http, not even to an
    allowed origin. One time limit covers all of them. Every failure raises `InvalidRequest`, because the remedy is
    always the caller's: another URL, or `instead`.
    """
    deadline = client.deadline()
    try:
        for _ in range(MAX_REDIRECTS + 1):
            reply = await client.request(
                "GET", url, field=field, headers=_ACCEPT, max_bytes=max_bytes, deadline=deadline
            )
            if reply.status == 200:
                return reply.body
            if reply.status not in _REDIRECTS:
                raise InvalidRequest(field, f"the URL was answered with status {reply.status} instead of a file")
            url = _next(url, reply.headers.get("location", ""), field)
    except RemoteError as error:
        raise InvalidRequest(field, f"{str(error).removeprefix(f'{field}: ')}; {instead}") from None
    raise InvalidRequest(field, f"the URL was redirected more than {MAX_REDIRECTS} times; name the last one")


def _next(url: str, location: str, field: str) -> str:
    """Return the target of a redirect; it is checked when it is requested."""
    if not location:
        raise InvalidRequest(field, "the URL redirects without saying where")
    try:
        following = urljoin(url, location)
    except ValueError:
        raise InvalidRequest(field, "the URL redirects to what is no URL") from None
    if not following.lower().startswith("https:"):
        raise InvalidRequest(field, "the URL redirects to one that is not https")
    return following
