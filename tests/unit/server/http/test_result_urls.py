"""Signed URLs: made here, unchanged, not expired."""

from __future__ import annotations

import time
from urllib.parse import parse_qs, urlsplit

import pytest

from limner.errors import AccessDenied, NotFound
from limner.server.http.result_urls import ResultUrls
from limner.server.jobs.records import Job


def test_a_url_is_of_one_picture_until_it_expires() -> None:
    urls, expires = ResultUrls(b"s" * 32), time.time() + 100
    job = Job(
        owner="a", prompt="a", seeds=(1, 2), id="i", output_format="jpeg", expires=expires, result={"files": [1, 2]}
    )
    first, second = urls.of(job, "https://host")
    assert first.startswith("https://host/v1/results/i/1.jpg?")
    query = parse_qs(urlsplit(second).query)
    signature = query["signature"][0]
    urls.check("i", 2, int(expires), signature)
    for id_, number, until in (("j", 2, int(expires)), ("i", 1, int(expires)), ("i", 2, int(expires) + 1)):
        with pytest.raises(AccessDenied):
            urls.check(id_, number, until, signature)
    with pytest.raises(AccessDenied):
        ResultUrls(b"t" * 32).check("i", 2, int(expires), signature)
    (old,) = urls.of(Job(owner="a", prompt="a", seeds=(1,), id="i", expires=1.0, result={"files": [1]}), "")
    with pytest.raises(NotFound, match="expired"):
        urls.check("i", 1, 1, parse_qs(urlsplit(old).query)["signature"][0])
