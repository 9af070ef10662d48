"""Who calls, and how much: API keys, requests a minute, jobs at once.

Owns the key file, the check of a key and the limits of an owner. Knows nothing of HTTP beyond the two headers that carry
a key, and nothing of jobs beyond how many run.

Keys are kept as SHA-256, without salt and without a slow hash. Those protect what people invent: a leaked hash of a
password is attacked by guessing. A key made here is 256 random bits, which nobody guesses at any speed, and a slow hash
would be paid with every request.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import math
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from limner.errors import AccessDenied, InvalidRequest, RateLimited

__all__ = ["KeyRing", "LimitPolicy", "Limiter", "Owner", "Slot", "check_bind", "new_key"]

MIN_KEY_CHARACTERS = 16
"""Keys given by hand that are shorter can be guessed."""
_MAX_KEY_CHARACTERS = 512
_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_KEY = re.compile(r"[!-+\--9;-~]+")  # printable ASCII without space, comma and colon
_PREFIX = "limner_"  # lets scanners for secrets find a key that was published by mistake
_REMEDY = "make keys with `limner serve --keys FILE --new-key NAME`"

_TOKEN = 1 - 1e-9  # parts of a token that were counted one by one add up to a little less than one

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Whom a key belongs to. `id` is made from the name: it stays when the key is renewed, and fits in a file name."""

    name: str
    id: str

    @classmethod
    def named(cls, name: str) -> Owner:
        return cls(name=name, id=hashlib.sha256(name.encode()).hexdigest()[:16])


LOCAL = Owner.named("local")
"""Everybody, where the service has no keys."""


def new_key(name: str) -> tuple[str, str]:
    """A new key for `name`: the key itself, to be shown once, and the line for the key file. 256 random bits."""
    _check_name(name, "name")
    plain = _PREFIX + secrets.token_urlsafe(32)
    return plain, f"{name} sha256:{_digest(plain).hex()}"


class KeyRing:
    """The keys that are accepted. Made by `from_file`, `from_environment` or `open`."""

    def __init__(self, keys: Iterable[tuple[Owner, bytes]], *, path: Path | None = None, is_open: bool = False) -> None:
        self._keys = tuple(keys)
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._reported = ""
        self._lock = threading.Lock()
        self.is_open = is_open

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KeyRing:
        """The keys of a file with lines `NAME sha256:<hex>`; empty lines and those that begin with # are skipped.

        The file is read again when it has changed, so taking a line away takes effect at once. A changed file that
        cannot be understood leaves the keys as they were and is reported in the log; one without any key locks everybody
        out. Raises InvalidRequest, naming file and line, if the file cannot be used at the start.
        """
        ring = cls((), path=(file := Path(path)))
        try:
            ring._stamp = _stamp(file)  # before reading: a change in between is seen later
            ring._keys = _read_keys(file)
        except OSError as error:
            raise InvalidRequest("keys", f"{path} cannot be read ({error.strerror}); {_REMEDY}") from None
        if not ring._keys:
            raise InvalidRequest("keys", f"{path} has no keys; {_REMEDY}")
        return ring

    @classmethod
    def from_environment(cls, value: str, *, field: str = "LIMNER_KEYS") -> KeyRing:
        """Plain keys, separated by commas: `NAME:KEY` or `KEY`. Messages count the entries and never show a key."""
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
        """No keys: everybody is the owner "local". `check_bind` allows it on loopback addresses only."""
        return cls((), is_open=True)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the owners, each once, in the order of the file."""
        return tuple(dict.fromkeys(owner.name for owner, _ in self._keys))

    def identify(self, headers: Mapping[str, str]) -> Owner:
        """The owner of the key in `x-key` or `Authorization: Bearer`; raises AccessDenied.

        `headers` may repeat names in `items()`, as Starlette's do. Two different keys in one request are refused: which
        one counts must not depend on who reads the headers.
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
            for owner, known in self._keys:  # all of them: the time does not tell which one matched
                if hmac.compare_digest(digest, known):
                    found = owner
        if found is None:
            raise AccessDenied("this key is not valid here; it may have been revoked", missing=False)
        return found

    def _refresh(self) -> None:
        """Read the file again if it is another one than before; one `stat` otherwise."""
        if self._path is None:
            return
        with self._lock:
            try:
                stamp = _stamp(self._path)
                if stamp == self._stamp:
                    return
                self._keys = _read_keys(self._path)
            except OSError as error:  # tried again with the next request: it may pass, and keys may have been revoked
                self._report(f"{self._path} cannot be read ({error.strerror})")
            except InvalidRequest as error:
                self._stamp = stamp
                self._report(str(error))
            else:
                self._stamp, self._reported = stamp, ""
                level = logging.INFO if self._keys else logging.WARNING
                _log.log(level, "%s read again: %d keys", self._path, len(self._keys))

    def _report(self, problem: str) -> None:
        """Say once that the keys from before stay valid."""
        if problem != self._reported:
            self._reported = problem
            _log.error("the key file is not used, the keys read before stay valid: %s", problem)


def check_bind(host: str, keyring: KeyRing) -> None:
    """Raise InvalidRequest unless there are keys or `host` is of this machine alone (127.0.0.0/8, ::1, localhost)."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitPolicy:
    """What one owner may do: requests a minute (long-run), `burst` requests at once, `concurrent` unfinished jobs."""

    requests_per_minute: float = 120.0
    burst: int = 30
    concurrent: int = 24

    def __post_init__(self) -> None:
        if not (math.isfinite(self.requests_per_minute) and self.requests_per_minute > 0):
            raise InvalidRequest("requests_per_minute", f"{self.requests_per_minute} is not a number above 0")
        for field in ("burst", "concurrent"):
            if getattr(self, field) < 1:
                raise InvalidRequest(field, f"{getattr(self, field)} is below 1")


class Limiter:
    """Counts the requests and jobs of owners. Safe to use from several threads; `clock` gives seconds that never go back.

    Memory: an owner takes room while a job of his runs, or as long as his bucket is not full again.
    """

    def __init__(self, policy: LimitPolicy | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy or LimitPolicy()
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = self.policy.requests_per_minute / 60
        # owner's id: tokens left and when they were counted; the least recently used first
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._running: dict[str, list[Slot]] = {}
        self._mean_seconds: float | None = None

    def admit(self, owner: Owner) -> None:
        """Count one request; raises RateLimited if the bucket is empty, with the time until it has a token again."""
        with self._lock:
            now = self._clock()
            self._forget_full(now)
            tokens, counted = self._buckets.get(owner.id, (float(self.policy.burst), now))
            tokens = min(self.policy.burst, tokens + (now - counted) * self._rate)
            admitted = tokens >= _TOKEN
            self._buckets[owner.id] = (max(0.0, tokens - 1) if admitted else tokens, now)
            self._buckets.move_to_end(owner.id)
            if not admitted:
                raise RateLimited(
                    f"{owner.name} may send {self.policy.requests_per_minute:g} requests a minute",
                    retry_after=_whole_seconds((_TOKEN - tokens) / self._rate),
                )

    def hold(self, owner: Owner, *, beyond_limit: bool = False) -> Slot:
        """Take one of the owner's places for a job; give it back with `Slot.release` or by leaving a `with` block.

        Raises RateLimited if all are taken. `beyond_limit` is for jobs that were accepted before, such as those that a
        restart finds in the store.

        The time to wait is when the oldest job should end: jobs have taken `mean` seconds so far (a moving average over
        all owners), of which it has run a part. Where none has ended yet, or it is over that time already, the estimate
        is as long again as it has run: that is the median for a process of which nothing but its age is known.
        """
        with self._lock:
            now = self._clock()
            held = self._running.get(owner.id, [])
            if len(held) >= self.policy.concurrent and not beyond_limit:
                age = now - held[0].since
                mean = self._mean_seconds
                remaining = mean - age if mean is not None and mean > age else age
                raise RateLimited(
                    f"{owner.name} has {len(held)} unfinished jobs and may have {self.policy.concurrent}",
                    retry_after=_whole_seconds(remaining),
                )
            slot = Slot(self, owner.id, now)
            self._running.setdefault(owner.id, []).append(slot)
            return slot

    def running(self, owner: Owner) -> int:
        """How many places of the owner are taken."""
        with self._lock:
            return len(self._running.get(owner.id, ()))

    @property
    def num_owners(self) -> int:
        """How many owners take room in memory."""
        with self._lock:
            return len(self._buckets.keys() | self._running.keys())

    def _forget_full(self, now: float) -> None:
        """Drop buckets that are full again: they are as good as none."""
        fills = self.policy.burst / self._rate
        while self._buckets:
            key, (_, counted) = next(iter(self._buckets.items()))
            if now - counted < fills:
                return
            del self._buckets[key]

    def _release(self, slot: Slot) -> None:
        with self._lock:
            held = self._running.get(slot.owner_id, [])
            if slot not in held:
                return
            held.remove(slot)
            if not held:
                del self._running[slot.owner_id]
            took = self._clock() - slot.since
            self._mean_seconds = took if self._mean_seconds is None else 0.8 * self._mean_seconds + 0.2 * took


class Slot:
    """A place that a job takes. Releasing it again does nothing."""

    __slots__ = ("_limiter", "owner_id", "since")

    def __init__(self, limiter: Limiter, owner_id: str, since: float) -> None:
        self._limiter = limiter
        self.owner_id = owner_id
        self.since = since

    def release(self) -> None:
        self._limiter._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _whole_seconds(seconds: float) -> int:
    """Rounded up, so that who waits as long is not refused again."""
    return max(1, math.ceil(seconds))


def _digest(plain: str) -> bytes:
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


def _check_name(name: str, field: str) -> None:
    if not _NAME.fullmatch(name) or name == LOCAL.name:
        raise InvalidRequest(
            field,
            f"the name {name!r} is not allowed: 1 to 64 of A-Z a-z 0-9 . _ - after a letter or digit, not 'local'",
        )


def _add(keys: list[tuple[Owner, bytes]], owner: Owner, digest: bytes, field: str) -> None:
    """A name may have several keys (an old and a new one), a key has one name."""
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
    """What differs between two versions of a file."""
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
        if found is None:  # never shows the line: there may be a key in it
            raise InvalidRequest(
                field, f"is not `NAME sha256:<64 hex digits>`; plain keys do not belong into a file; {_REMEDY}"
            )
        _check_name(words[0], field)
        _add(keys, Owner.named(words[0]), bytes.fromhex(found[1]), field)
    return tuple(keys)
