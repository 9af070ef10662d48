"""`limner serve` and `limner deploy` up to where something is loaded: keys, ports, and options that are refused."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from limner.cli import main
from limner.server.access.keys import KeyRing


def test_a_new_key_is_printed_once_and_only_its_hash_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    printed = []
    for name in ("anna", "ben"):
        assert main(["serve", "--new-key", name, "--keys", str(file)]) == 0
        printed.append(capsys.readouterr().out.strip())
    assert len(file.read_text().splitlines()) == 2
    assert not any(key in file.read_text() for key in printed)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not KeyRing.from_file(str(file)).is_open
    file.write_text(file.read_text().rstrip("\n"))  # a file that somebody wrote without a last newline
    assert main(["serve", "--new-key", "carl", "--keys", str(file)]) == 0
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--new-key", "anna"], "--new-key: needs --keys FILE, to which its hash is added"),
        (["serve", "--new-key", "anna", "--keys", "/no/folder/keys"], "output: /no/folder/keys cannot be written"),
        (["serve", "--port", "65536"], "--port: 65536 is not within 0 to 65535"),
        (["deploy", "--port", "0"], "--port: 0 is not within 1 to 65535"),
        (["serve", "--data", "mysql://h/d"], "--data: mysql:// is not read"),
        (["serve", "--allow-origin", "x"], "--allow-origin: "),
        (["serve", "--host", "0.0.0.0"], "--host: '0.0.0.0' can be reached from other machines"),
        (["serve", "--max-pixels", "1"], "--max-pixels: 1 is not allowed"),
        (["serve", "--store-cache", "/near"], "--store-cache: /near is a folder before a URL"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LIMNER_STORE", "LIMNER_KEYS"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"limner: {message}")
