"""Who calls: API keys, their file, and the check of a key.

Owns the reading of the key file and the two headers that carry a key. Knows nothing else of HTTP, and nothing of limits.

Keys are stored as SHA-256, without salt and without a slow hash. Those protect what people invent: a leaked hash of a
password is attacked by guessing. A key made here is 256 random bits, which nobody guesses at any speed, and a slow hash
would be paid with every request.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from limner.errors import AccessDenied, InvalidRequest

__all__ = ["OPERATOR", "KeyRing", "Owner", "check_bind", "new_key"]

MIN_KEY_CHARACTERS = 16
"""Shorter keys, chosen by hand, can be guessed."""
_MAX_KEY_CHARACTERS = 512
_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_KEY = re.compile(r"[!-+\--9;-~]+")  # printable ASCII without space, comma and colon
_PREFIX = "limner_"  # lets scanners for secrets find a key that was published by mistake
_REMEDY = "make keys with `limner serve --keys FILE --new-key NAME`"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The holder of a key. `id` is made from the name: it stays when the key is renewed, and fits in a file name."""

    name: str
    id: str

    @classmethod
    def named(cls, name: str) -> Owner:
        return cls(name=name, id=hashlib.sha256(name.encode()).hexdigest()[:16])


OPERATOR = "operator"
"""The name of the key whose holder reads all metrics; those of references tell of all tenants together."""
LOCAL = Owner.named("local")
"""Every caller of a service without keys."""


def new_key(name: str) -> tuple[str, str]:
    """Return a new key of 256 random bits, to be shown once, and its line for the key file."""
    _check_name(name, "name")
    plain = _PREFIX + secrets.token_urlsafe(32)
    return plain, f"{name} sha256:{_digest(plain).hex()}"


class KeyRing:
    """The accepted keys. Made by `from_file`, `from_environment` or `open`."""

    def __init__(self, keys: Iterable[tuple[Owner, bytes]], *, path: Path | None = None, is_open: bool = False) -> None:
        self._keys = tuple(keys)
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._reported = ""
        self._lock = threading.Lock()
        self.is_open = is_open

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KeyRing:
        """Read a file with lines `NAME sha256:<hex>`; empty lines and lines that begin with # are skipped.

        The file is read again when it changes, so removing a line takes effect at once. If a changed file is damaged,
        the keys read before stay valid and the log reports it. A changed file without any key locks everybody out.
        Raises `InvalidRequest`, naming file and line, if the file cannot be used at the start.
        """
        ring = cls((), path=(file := Path(path)))
        try:
            ring._stamp = _stamp(file)  # before reading, so that a change in between is noticed later
            ring._keys = _read_keys(file)
        except OSError as error:
            raise InvalidRequest("keys", f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
        if not ring._keys:
            raise InvalidRequest("keys", f"{path} has no keys; {_REMEDY}")
        return ring

    @classmethod
    def from_environment(cls, value: str, *, field: str = "LIMNER_KEYS") -> KeyRing:
        """Read plain keys, separated by commas: `NAME:KEY` or `KEY`. Error messages number the entries and show no key."""
        keys: list[tuple[Owner, bytes]] = []
        for number, entry in enumerate(value.split(","), start=1):
            name, colon, plain = (part.strip() for part in entry.rpartition(":"))
            if colon:
                _check_name(name, f"{field} entry {number}")
            if not _KEY.fullmatch(plain):
                raise InvalidRequest(
                    f"{field} entry {number}",
                    "is not a key: printable ASCII without spaces, commas and colons, as KEY or NAME:KEY",
                )
            if not MIN_KEY_CHARACTERS <= len(plain) <= _MAX_KEY_CHARACTERS:
                raise InvalidRequest(
                    f"{field} entry {number}",
                    f"has {len(plain)} characters; {MIN_KEY_CHARACTERS} to {_MAX_KEY_CHARACTERS} are allowed; {_REMEDY}",
                )
            digest = _digest(plain)
            _add(keys, Owner.named(name or f"key-{digest.hex()[:8]}"), digest, f"{field} entry {number}")
        return cls(keys)

    @classmethod
    def open(cls) -> KeyRing:
        """Accept everybody as the owner "local". `check_bind` allows it on loopback addresses only."""
        return cls((), is_open=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the owners, each once, in file order."""
        return tuple(dict.fromkeys(owner.name for owner, _ in self._keys))

    def identify(self, headers: Mapping[str, str]) -> Owner:
        """Return the owner of the key in `x-key` or `Authorization: Bearer`. Raises `AccessDenied`.

        `headers` may repeat names in `items()`, as Starlette's do. Two different keys in one request are refused: which
        one counts must not depend on the parser.
        """
        if self.is_open:
            return LOCAL
        self._refresh()
        sent = _sent_keys(headers)
        if not sent:
            raise AccessDenied("no key; send it in the header x-key or as Authorization: Bearer KEY", missing=True)
        if len(sent) > 1:
            raise AccessDenied("more than one key in a request; send one", missing=False)
        plain = sent.pop()
        found: Owner | None = None
        if len(plain) <= _MAX_KEY_CHARACTERS:
            digest = _digest(plain)
            for owner, known in self._keys:  # never stop early: the time must not reveal which one matched
                if hmac.compare_digest(digest, known):
                    found = owner
        if found is None:
            raise AccessDenied("this key is not valid here; it may have been revoked", missing=False)
        return found

    def _refresh(self) -> None:
        """Read the file again if it changed; otherwise this costs one `stat`."""
        if self._path is None:
            return
        with self._lock:
            try:
                stamp = _stamp(self._path)
                if stamp == self._stamp:
                    return
                self._keys = _read_keys(self._path)
            except OSError as error:  # may be temporary, and keys may have been revoked: retry with the next request
                self._report(f"{self._path} cannot be read ({error.strerror})")
            except InvalidRequest as error:
                self._stamp = stamp
                self._report(str(error))
            else:
                self._stamp, self._reported = stamp, ""
                level = logging.INFO if self._keys else logging.WARNING
                _logger.log(level, "%s read again: %d keys", self._path, len(self._keys))

    def _report(self, problem: str) -> None:
        """Log once that the keys read before stay valid."""
        if problem != self._reported:
            self._reported = problem
            _logger.error("the key file is not used, the keys read before stay valid: %s", problem)


def check_bind(host: str, keyring: KeyRing) -> None:
    """Raise `InvalidRequest` if there are no keys and other machines can reach `host` (not 127.0.0.0/8, ::1, localhost)."""
    if not keyring.is_open:
        return
    try:
        local = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        local = host.lower() == "localhost"
    if not local:
        raise InvalidRequest(
            "host",
            f"{host!r} can be reached from other machines, and there are no keys; serve on 127.0.0.1, or {_REMEDY} and "
            "give the file with --keys",
        )


def _digest(plain: str) -> bytes:
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


def _check_name(name: str, field: str) -> None:
    if not _NAME.fullmatch(name) or name == LOCAL.name:
        raise InvalidRequest(
            field,
            f"the name {name!r} is not allowed: 1 to 64 of A-Z a-z 0-9 . _ - after a letter or digit, not 'local'",
        )


def _add(keys: list[tuple[Owner, bytes]], owner: Owner, digest: bytes, field: str) -> None:
    """Add a key. A name may have several keys (an old and a new one), a key has one name."""
    if any(known == digest for _, known in keys):
        raise InvalidRequest(field, "this key is there already; make one for each name")
    keys.append((owner, digest))


def _sent_keys(headers: Mapping[str, str]) -> set[str]:
    sent = set()
    for name, value in headers.items():
        if name.lower() == "x-key":
            sent.add(value.strip())
        elif name.lower() == "authorization":
            scheme, _, key = value.strip().partition(" ")
            if scheme.lower() == "bearer":
                sent.add(key.strip())
    sent.discard("")
    return sent


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a value that differs between two versions of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_keys(path: Path) -> tuple[tuple[Owner, bytes], ...]:
    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidRequest("keys", f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise InvalidRequest("keys", f"{path} is not UTF-8 text") from None
    keys: list[tuple[Owner, bytes]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        field = f"{path} line {number}"
        found = _HASH.fullmatch(words[-1]) if len(words) == 2 else None
        if found is None:  # the message never repeats the line: it may hold a key
            raise InvalidRequest(
                field, f"is not `NAME sha256:<64 hex digits>`; plain keys do not belong into a file; {_REMEDY}"
            )
        _check_name(words[0], field)
        _add(keys, Owner.named(words[0]), bytes.fromhex(found[1]), field)
    return tuple(keys)
