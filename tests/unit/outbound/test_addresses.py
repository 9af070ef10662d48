"""Which addresses are public."""

from __future__ import annotations

import ipaddress

import pytest
from tests.support.network import PUBLIC, PUBLIC_6

from limner.outbound.addresses import address_problem

PUBLIC_ADDRESSES = [
    PUBLIC,
    PUBLIC_6,
    "8.8.8.8",
    "1.1.1.1",
    "2001:4860:4860::8888",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "172.32.0.1",
    "192.0.1.1",
    "2a00:1450::1",
]


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses(address: str) -> None:
    assert address_problem(ipaddress.ip_address(address)) is None


def test_no_address_passes_that_python_calls_private() -> None:
    """Whatever the table says: 20,000 addresses of all kinds against `ipaddress`, in both notations of IPv4."""
    passed = 0
    for number in range(0, 1 << 32, (1 << 32) // 20_000):
        plain = ipaddress.IPv4Address(number)
        mapped = ipaddress.IPv6Address((0xFFFF << 32) | number)
        problem = address_problem(plain)
        assert problem == address_problem(mapped)
        if problem is None:
            assert plain.is_global
            passed += 1
    assert passed > 15_000
