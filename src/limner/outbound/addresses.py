"""Which IP addresses are public.

Owns the table of networks that are not. Knows nothing of URLs and connections.
"""

from __future__ import annotations

import ipaddress

__all__ = ["Address", "address_problem", "literal_address"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# From the IANA registries of special-purpose addresses, deprecated ones included; older versions of Python lack some.
_NOT_PUBLIC: tuple[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, str], ...] = (
    (ipaddress.IPv4Network("0.0.0.0/8"), "this host"),
    (ipaddress.IPv4Network("10.0.0.0/8"), "private"),
    (ipaddress.IPv4Network("100.64.0.0/10"), "shared by carriers"),
    (ipaddress.IPv4Network("127.0.0.0/8"), "loopback"),
    (ipaddress.IPv4Network("168.63.129.16/32"), "metadata of a cloud"),
    (ipaddress.IPv4Network("169.254.0.0/16"), "link-local"),
    (ipaddress.IPv4Network("172.16.0.0/12"), "private"),
    (ipaddress.IPv4Network("192.0.0.0/24"), "protocols"),
    (ipaddress.IPv4Network("192.0.2.0/24"), "documentation"),
    (ipaddress.IPv4Network("192.88.99.0/24"), "6to4 relay"),
    (ipaddress.IPv4Network("192.168.0.0/16"), "private"),
    (ipaddress.IPv4Network("198.18.0.0/15"), "benchmarks"),
    (ipaddress.IPv4Network("198.51.100.0/24"), "documentation"),
    (ipaddress.IPv4Network("203.0.113.0/24"), "documentation"),
    (ipaddress.IPv4Network("224.0.0.0/4"), "multicast"),
    (ipaddress.IPv4Network("240.0.0.0/4"), "reserved"),
    (ipaddress.IPv6Network("2001::/23"), "protocols, Teredo"),
    (ipaddress.IPv6Network("2001:db8::/32"), "documentation"),
    (ipaddress.IPv6Network("2002::/16"), "6to4"),
    (ipaddress.IPv6Network("3fff::/20"), "documentation"),
)


def address_problem(address: Address) -> str | None:
    """Return why an address may not be reached, or None for a public one.

    Stricter than `is_global`, which differs between versions of Python and calls multicast, deprecated site-local and
    IPv4-compatible addresses global. IPv6 has to be global unicast (2000::/3, RFC 4291). IPv4-mapped addresses and those
    of the well-known NAT64 prefix (RFC 6052, what DNS64 gives to machines without IPv4) are judged by the IPv4 address
    in them. Tunnels (6to4, Teredo) are refused. A network's own NAT64 prefix cannot be told from other addresses.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return address_problem(inner)
        if address not in _GLOBAL_UNICAST:
            return "is not a public address"
    for network, use in _NOT_PUBLIC:
        if address.version == network.version and address in network:
            return f"is not a public address ({use})"
    if not address.is_global or address.is_multicast or address.is_reserved:
        return "is not a public address"
    return None


def literal_address(host: str) -> Address | None:
    """Return the address that a host is written as, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
