"""Options that contradict each other, where the application is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from limner.engine.protocol import Backend
from limner.errors import InvalidRequest
from limner.options import ServeOptions, ServiceOptions
from limner.server.application import build_app, check_options, keyring


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ServiceOptions(c2pa_development=True, c2pa_certificate="c.pem"), "--c2pa-development: a certificate is given"),
        (ServiceOptions(c2pa_certificate="c.pem"), "--c2pa-certificate: needs --c2pa-key"),
        (ServiceOptions(c2pa_key="k.pem"), "--c2pa-certificate: needs --c2pa-key"),
        (ServiceOptions(requests_per_minute=0), "requests_per_minute: 0 is not a number above 0"),
    ],
)
def test_what_contradicts_is_refused(options: ServiceOptions, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        build_app(cast(Backend, None), options, model_name="m")


def test_keys_come_from_the_file_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIMNER_KEYS", raising=False)
    assert keyring(ServiceOptions()).is_open
    monkeypatch.setenv("LIMNER_KEYS", "anna:anna-key-0123456789")
    assert not keyring(ServiceOptions()).is_open
    with pytest.raises(InvalidRequest, match="keys"):
        keyring(ServiceOptions(keys=str(tmp_path / "missing")))
    check_options(ServeOptions(host="0.0.0.0"))  # there are keys
    monkeypatch.delenv("LIMNER_KEYS")
    with pytest.raises(InvalidRequest, match="can be reached from other machines"):
        check_options(ServeOptions(host="0.0.0.0"))
