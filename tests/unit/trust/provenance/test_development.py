"""The certificate for development."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest
from tests.support.provenance import made, operator

from limner import InvalidRequest, OutputError
from limner.trust.provenance import Signer, development_credentials, read, sign


def test_development_credentials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "c2pa"
    with caplog.at_level(logging.WARNING, logger="limner"):
        signer = development_credentials(folder)
    assert "made a development certificate" in caplog.text
    assert sorted(os.listdir(folder)) == ["certificate.pem", "key.pem", "root.pem"]
    assert os.listdir(folder.parent) == ["c2pa"]
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert signer.development
    assert signer.common_name == "Limner development certificate"
    assert b"PRIVATE" not in repr(signer).encode()
    assert development_credentials(folder) == signer  # kept
    (tmp_path / "empty").mkdir()
    assert development_credentials(tmp_path / "empty").private_key != signer.private_key
    signed = sign(made(), format="PNG", title="t", action="created", signer=signer)
    report = read(signed)
    assert report.development
    assert "for development only" in "\n".join(report.describe())
    assert (report.issuer, report.signed_by) == ("Limner development (not for production)", signer.common_name)
    assert read(signed, trust=(folder / "root.pem").read_bytes()).state == "Trusted"
    assert read(signed, trust=(tmp_path / "empty" / "root.pem").read_bytes()).state == "Valid"


def test_refuses_folders(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="full cannot be made .*; give a new or empty folder"):
        development_credentials(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    with pytest.raises(OutputError, match="cannot be made"):
        development_credentials(tmp_path / "full" / "notes.txt" / "c2pa")


def test_two_processes_at_once_get_one_certificate(tmp_path: Path) -> None:
    found: list[Signer] = []
    threads = [
        threading.Thread(target=lambda: found.append(development_credentials(tmp_path / "c2pa"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({signer.private_key for signer in found}) == 1
    assert os.listdir(tmp_path) == ["c2pa"]


def test_another_certificate_is_not_taken_for_a_development_one(tmp_path: Path) -> None:
    chain, key = operator(tmp_path)
    (tmp_path / "c2pa").mkdir()
    chain.rename(tmp_path / "c2pa" / "certificate.pem")
    key.rename(tmp_path / "c2pa" / "key.pem")
    with pytest.raises(InvalidRequest, match="folder: .* holds the certificate of 'Studio', none for development"):
        development_credentials(tmp_path / "c2pa")
