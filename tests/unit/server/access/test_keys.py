"""Keys: who comes in, and who is refused."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from limner.errors import AccessDenied, InvalidRequest
from limner.server.access.keys import KeyRing, Owner, check_bind, new_key

ANNA, BEN = Owner.named("anna"), Owner.named("ben")


def write(path: Path, *lines: str) -> None:
    """As an operator's tool does: a new file takes the place of the old one."""
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    os.replace(new, path)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """A key file of two owners, and their keys."""
    path = tmp_path / "keys"
    (anna, line), (ben, other) = new_key("anna"), new_key("ben")
    write(path, "# who may draw", "", line, other)
    return path, anna, ben


def test_a_new_key_is_random_and_only_its_hash_is_in_the_line() -> None:
    (plain, line), (again, _) = new_key("anna"), new_key("anna")
    assert plain != again
    assert len(plain.removeprefix("limner_")) >= 43  # 256 bits in base64
    assert plain not in line
    assert re.fullmatch(r"anna sha256:[0-9a-f]{64}", line)


@pytest.mark.parametrize("name", ["", "a b", "local", "-x", "a" * 65, "a/b", "ä", "a\n"])
def test_names_that_break_a_line_or_mean_everybody_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        new_key(name)


def test_both_headers_are_accepted(keys: tuple[Path, str, str]) -> None:
    path, anna, ben = keys
    ring = KeyRing.from_file(path)
    assert ring.names == ("anna", "ben")
    assert ring.identify({"x-key": anna}) == ANNA
    assert ring.identify({"X-Key": ben}) == BEN
    assert ring.identify({"authorization": f"Bearer {ben}"}) == BEN
    assert ring.identify({"Authorization": f"bearer  {anna} "}) == ANNA
    assert ring.identify({"Authorization": f"Bearer {anna}", "x-key": anna}) == ANNA


def test_starlette_style_headers_that_repeat_a_name_are_all_seen(keys: tuple[Path, str, str]) -> None:
    path, anna, ben = keys

    class Repeated(dict[str, str]):
        def items(self) -> list[tuple[str, str]]:  # type: ignore[override]
            return [("x-key", anna), ("x-key", ben)]

    with pytest.raises(AccessDenied, match="more than one"):
        KeyRing.from_file(path).identify(Repeated())


@pytest.mark.parametrize(
    ("headers", "missing"),
    [
        ({}, True),
        ({"x-key": ""}, True),
        ({"authorization": "Bearer "}, True),
        ({"authorization": "Basic YTpi"}, True),
        ({"x-key": "wrong"}, False),
        ({"x-key": "x" * 100_000}, False),
        ({"x-key": "\ud800ü"}, False),
        ({"x-key": "one-key", "authorization": "Bearer another-key"}, False),
    ],
)
def test_others_are_denied(keys: tuple[Path, str, str], headers: dict[str, str], missing: bool) -> None:
    with pytest.raises(AccessDenied) as caught:
        KeyRing.from_file(keys[0]).identify(headers)
    assert caught.value.missing is missing
    assert "wrong" not in str(caught.value)


def test_the_hash_in_the_file_is_no_key(keys: tuple[Path, str, str]) -> None:
    path = keys[0]
    for word in path.read_text().split():
        if word.startswith("sha256:"):
            for stolen in (word, word.removeprefix("sha256:")):
                with pytest.raises(AccessDenied):
                    KeyRing.from_file(path).identify({"x-key": stolen})


def test_a_key_is_compared_with_all(keys: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, anna, _ = keys
    ring = KeyRing.from_file(path)
    import hmac

    compared = []

    def counted(a: bytes, b: bytes, real: object = hmac.compare_digest) -> bool:
        compared.append(b)
        return real(a, b)  # type: ignore[operator,no-any-return]

    monkeypatch.setattr("limner.server.access.keys.hmac.compare_digest", counted)
    assert ring.identify({"x-key": anna}) == ANNA
    assert len(compared) == 2


def test_revoked_and_added_keys_count_without_a_restart(keys: tuple[Path, str, str]) -> None:
    path, anna, ben = keys
    ring = KeyRing.from_file(path)
    plain, line = new_key("carl")
    write(path, *(kept for kept in path.read_text().splitlines() if not kept.startswith("anna")), line)
    assert ring.identify({"x-key": plain}) == Owner.named("carl")
    assert ring.identify({"x-key": ben}) == BEN
    with pytest.raises(AccessDenied):
        ring.identify({"x-key": anna})


def test_a_renewed_key_is_the_same_owner(keys: tuple[Path, str, str]) -> None:
    path, anna, _ = keys
    plain, line = new_key("anna")
    write(path, *path.read_text().splitlines(), line)
    ring = KeyRing.from_file(path)
    assert ring.identify({"x-key": anna}) == ring.identify({"x-key": plain}) == ANNA


def test_a_broken_file_keeps_the_keys_and_is_reported_once(
    keys: tuple[Path, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path, anna, _ = keys
    ring = KeyRing.from_file(path)
    write(path, "anna my-plain-secret-key")
    for _ in range(3):
        assert ring.identify({"x-key": anna}) == ANNA
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "line 1" in caplog.text
    assert "my-plain-secret-key" not in caplog.text

    path.unlink()
    for _ in range(3):
        assert ring.identify({"x-key": anna}) == ANNA
    assert len(caplog.records) == 2

    write(path, new_key("ben")[1])  # and it works again
    with pytest.raises(AccessDenied):
        ring.identify({"x-key": anna})


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(
    keys: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, anna, _ = keys
    ring = KeyRing.from_file(path)
    write(path, new_key("ben")[1])

    def full(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", full)
        assert ring.identify({"x-key": anna}) == ANNA
    with pytest.raises(AccessDenied):  # the same version of the file: revoking was not lost
        ring.identify({"x-key": anna})


def test_a_file_emptied_while_serving_locks_everybody_out(keys: tuple[Path, str, str]) -> None:
    path, anna, _ = keys
    ring = KeyRing.from_file(path)
    write(path, "# nobody")
    with pytest.raises(AccessDenied):
        ring.identify({"x-key": anna})
    with pytest.raises(AccessDenied):
        ring.identify({})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no keys"),
        (b"# only words\n", "has no keys"),
        (b"anna\n", "line 1"),
        (b"\nanna secret-key-in-the-open\n", "line 2"),
        (b"anna sha256:abcd\n", "line 1"),
        (b"anna sha256:" + b"0" * 64 + b" more\n", "line 1"),
        (b"local sha256:" + b"0" * 64 + b"\n", "'local'"),
        (b"anna sha256:" + b"0" * 64 + b"\nben sha256:" + b"0" * 64 + b"\n", "line 2.*there already"),
        (b"\xff\xfe", "not UTF-8"),
        (b"#" * ((1 << 20) + 1), "larger than"),
    ],
)
def test_a_bad_file_is_refused_at_the_start(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=problem) as caught:
        KeyRing.from_file(path)
    assert "secret-key" not in str(caught.value)


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read.*limner serve --keys FILE --new-key"):
        KeyRing.from_file(tmp_path / "none")


def test_keys_from_the_environment() -> None:
    ring = KeyRing.from_environment("anna:0123456789abcdef, fedcba9876543210")
    assert ring.identify({"x-key": "0123456789abcdef"}) == ANNA
    unnamed = ring.identify({"x-key": "fedcba9876543210"})
    assert re.fullmatch(r"key-[0-9a-f]{8}", unnamed.name)
    assert KeyRing.from_environment("fedcba9876543210").identify({"x-key": "fedcba9876543210"}) == unnamed
    assert "0123456789abcdef" not in repr(vars(ring))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "short",
        "anna:0123456789abcde",
        ":0123456789abcdef",
        "a b:0123456789abcdef",
        "0123456789 abcdef",
        "anna:0123456789abcdef,",
        "anna:0123456789abcdef,ben:0123456789abcdef",
        "x" * 513,
        "0123456789abcdéf",
        "a:b:0123456789abcdef",
    ],
)
def test_bad_keys_in_the_environment_are_refused_and_not_shown(value: str) -> None:
    with pytest.raises(InvalidRequest, match=r"LIMNER_KEYS entry [12]") as caught:
        KeyRing.from_environment(value)
    assert "0123456789" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost"])
def test_without_keys_this_machine_is_served(host: str) -> None:
    check_bind(host, KeyRing.open())
    assert KeyRing.open().identify({"x-key": "whatever"}) == Owner.named("local")


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "192.168.1.5", "8.8.8.8", "example.org", "localhost.example.org", "127.1", "::ffff:0.0.0.0"],
)
def test_without_keys_other_machines_are_not(host: str) -> None:
    with pytest.raises(InvalidRequest, match=r"host.*127\.0\.0\.1.*limner serve --keys FILE --new-key NAME.*--keys"):
        check_bind(host, KeyRing.open())
    check_bind(host, KeyRing.from_environment("0123456789abcdef"))
