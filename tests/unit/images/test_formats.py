"""The table of picture formats."""

from __future__ import annotations

import pytest
from tests.support.pictures import encoded
from tests.support.tiny import picture

from limner.images import FORMATS, MEDIA_TYPES, SUFFIXES, format_of


def test_the_tables_name_the_same_formats() -> None:
    assert list(SUFFIXES) == list(MEDIA_TYPES) == ["png", "jpeg", "webp"]
    assert {name: FORMATS[suffix].lower() for name, suffix in SUFFIXES.items()} == {name: name for name in SUFFIXES}
    assert {name.lower() for name in FORMATS.values()} == set(SUFFIXES)


@pytest.mark.parametrize("name", SUFFIXES)
def test_first_bytes_tell_the_format(name: str) -> None:
    data = encoded(picture(64, 64), name.upper())
    assert format_of(data) == name
    assert format_of(data[1:]) is None
