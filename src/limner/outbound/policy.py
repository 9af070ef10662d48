"""Which URLs the service may reach for a caller, as far as the URL alone says.

Knows nothing of name resolution and connections; `client` checks the addresses that a name resolves to.
"""

from __future__ import annotations

from dataclasses import dataclass

from limner.errors import InvalidRequest
from limner.outbound.addresses import address_problem, literal_address
from limner.outbound.urls import MAX_URL_CHARACTERS, Origin, Target, parse_url

__all__ = ["OutboundPolicy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboundPolicy:
    """What may be reached. Times are in seconds; `total_seconds` covers everything from resolving to the last byte.

    The operator trusts the origins in `allowed` even if they are not public, not on a port in `ports`, or not https.
    """

    ports: frozenset[int] = frozenset({443})
    allowed: frozenset[Origin] = frozenset()
    connect_seconds: float = 5.0
    total_seconds: float = 30.0
    max_concurrent: int = 16

    def check_url(self, url: str, *, field: str, max_characters: int = MAX_URL_CHARACTERS) -> Target:
        """Parse a URL and check everything that needs no network. Raises `InvalidRequest`."""
        target = parse_url(url, field=field, max_characters=max_characters)
        origin = target.origin
        if origin in self.allowed:
            return target
        if origin.scheme != "https":
            raise InvalidRequest(field, "the URL has to begin with https://")
        if origin.port not in self.ports:
            ports = ", ".join(map(str, sorted(self.ports)))
            raise InvalidRequest(field, f"port {origin.port} of the URL is not allowed; allowed: {ports}")
        literal = literal_address(origin.host)
        if literal is None and "." not in origin.host:
            raise InvalidRequest(field, f"{origin.host!r} is not a full host name; write one with its domain")
        if literal is not None and (problem := address_problem(literal)):
            raise InvalidRequest(field, f"{origin.host} {problem}; only public addresses may be named")
        return target
