"""Amounts of memory as text: parsing "20GiB" and printing bytes."""

from __future__ import annotations

import re

from limner.errors import InvalidRequest

__all__ = ["parse_bytes", "show_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(value: str | int, *, field: str = "memory_limit") -> int:
    """Parse "20GiB", "14.5 GB", "512MiB" or a number of bytes. Raises `InvalidRequest` for `field`."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidRequest(field, f'{value!r} is not a number of bytes; give one, or a text as "20GiB"')
    if isinstance(value, int):
        number = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise InvalidRequest(
                field, f'{value!r} is not an amount of memory; give it as "20GiB", "14.5GB" or in bytes'
            )
        number = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= number < 2**60:
        raise InvalidRequest(field, f"{value!r} is not within 1 byte to 1 EiB")
    return int(number)


def show_bytes(number: int) -> str:
    """Format bytes as GiB with two decimals, few ones as they are."""
    if 0 < number < 10**6:
        return f"{number} bytes"
    return f"{number / 2**30:.2f} GiB"
