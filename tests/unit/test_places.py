"""Folders and URLs: which is which, and what of a URL may be shown."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from limner import InvalidRequest
from limner.places import absolute, check_store, is_url, secrets_of, without_credentials


def test_a_url_is_no_folder() -> None:
    assert is_url("s3://bucket/x")
    assert not any(is_url(place) for place in ("kv", "/kv", "c:/kv", None))
    assert absolute("s3://bucket/x") == "s3://bucket/x"
    assert absolute("kv") == os.path.join(os.getcwd(), "kv")


@pytest.mark.parametrize(
    ("url", "shown", "secrets"),
    [
        ("sftp://anna:pa55word@host/dir", "sftp://***@host/dir", ["anna:pa55word", "pa55word"]),
        ("sftp://anna:x@host/dir", "sftp://***@host/dir", ["anna:x", "x"]),
        ("sftp://tokentoken@host/dir", "sftp://***@host/dir", ["tokentoken"]),
        ("sftp://e@host/dir", "sftp://***@host/dir", []),  # every "e" of a message would be ***
        ("abfs://kv@account.dfs.core.windows.net/x", "abfs://kv@account.dfs.core.windows.net/x", []),
        ("abfs://container@account/x", "abfs://container@account/x", []),
        ("abfs://container@account/x?sig=s1gnature", "abfs://container@account/x?***", ["sig=s1gnature", "s1gnature"]),
        ("abfs://user:pa55word@account/x", "abfs://***@account/x", ["user:pa55word", "pa55word"]),
        ("/a?b@c", "/a?b@c", []),
    ],
)
def test_what_of_a_url_is_shown(url: str, shown: str, secrets: list[str]) -> None:
    assert without_credentials(url) == shown
    if is_url(url):
        assert secrets_of(url) == secrets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"place": "/kv", "cache": "/near"}, "store_cache: /near is a folder before a URL"),
        ({"place": None, "cache": "/near"}, "store_cache: /near is a folder before a URL"),
        ({"place": "s3://kv/x", "disk_bytes": 9}, "store_bytes: 9 is the budget of a folder"),
        ({"place": "s3://kv/x", "disk_bytes": 9, "cache": "/near"}, None),
        ({"place": "/kv", "disk_bytes": 9}, None),
    ],
)
def test_a_folder_before_a_url(options: dict[str, Any], message: str | None) -> None:
    options = {"cache": None, "disk_bytes": None, **options}
    if message is None:
        check_store(**options)
        return
    with pytest.raises(InvalidRequest, match=message):
        check_store(**options)


def test_it_brings_nothing_heavy() -> None:
    program = "import sys, limner.places; print(sorted({'torch', 'fsspec', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
