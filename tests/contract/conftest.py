"""The page in headless Chromium, for modules with a fixture `server`: the address of a service with `CALLERS` as keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

# tests.support.browser is imported where it is used: it needs playwright, which other tests do without


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.support.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def callers() -> Iterator[str]:
    from tests.support.browser import new_keys

    return new_keys()


@pytest.fixture
def open_page(browser: Any, server: str, callers: Iterator[str]) -> Iterator[Any]:
    """Opens the page for a new caller; at the end, no page may have asked another host or thrown anything."""
    from tests.support.browser import Opener

    opener = Opener(browser, server, callers)
    yield opener
    opener.close()
