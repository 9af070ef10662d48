"""Keys of idempotency."""

from __future__ import annotations

import pytest

from limner.errors import InvalidRequest
from limner.server.jobs.records import check_idempotency_key


def test_keys_of_idempotency() -> None:
    assert check_idempotency_key(None) is None
    assert check_idempotency_key("a" * 255) == "a" * 255
    for wrong in ("", "a" * 256, "é", "a\nb", "\0"):
        with pytest.raises(InvalidRequest, match="idempotency_key"):
            check_idempotency_key(wrong)
