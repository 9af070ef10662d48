"""Calls to a filesystem that may hang or fail, each bounded in time, with a circuit breaker.

Each call runs in a thread of its own, which is abandoned when its time is over: it holds nobody, not even the end of the
process. After a failure the breaker is open: calls fail at once for a while, which grows from 5 seconds to 5 minutes with
each failure; then one caller tries. Opening and closing are logged. Explicit calls, which a person waits for, are tried in
any case, and do not open the breaker. No message holds the credentials of the URL.

Does not know what the calls do.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Literal, TypeVar

from limner.errors import LimnerError, OutputError, RemoteError
from limner.places import secrets_of, without_credentials

__all__ = ["CallGuard", "Doing", "WriteDenied"]

_logger = logging.getLogger("limner")
_R = TypeVar("_R")
Doing = Literal["be opened", "be asked", "be listed", "be read", "be written", "be changed"]
"""What a call does with the place, as error messages say it."""
_FIRST_PAUSE, _LAST_PAUSE = 5.0, 300.0
_MOST_ABANDONED = 8
"""Explicit calls fail while so many abandoned ones still hang: each of them holds a thread."""


class WriteDenied(Exception):
    """The filesystem answers, and does not permit the change."""


class CallGuard:
    """Runs calls to one filesystem. Safe to share by threads. `on_failure` is called after each failed call."""

    def __init__(self, url: str, *, on_failure: Callable[[], None]) -> None:
        self.url = without_credentials(url)
        self._secrets = secrets_of(url)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._pause, self._open_until = 0.0, 0.0
        self._abandoned: list[threading.Thread] = []
        """Threads of calls that were abandoned since the last answer."""

    @property
    def is_open(self) -> bool:
        """True after a failure, while nobody but explicit calls asks the filesystem."""
        with self._lock:
            return time.monotonic() < self._open_until

    def call(
        self,
        function: Callable[[], _R],
        limit: float | Callable[[Future[_R]], str],
        *,
        doing: Doing,
        explicit: bool = False,
    ) -> _R:
        """Return the result of a call, through the breaker.

        `limit` is in seconds, or a function that waits for the future and returns "" when it is done, else why to abandon
        it. Raises `FileNotFoundError`, `WriteDenied` and `OutputError`, which are answers, and `RemoteError`.
        """
        if explicit:
            self._check_abandoned()
        is_trial = not explicit and self._enter()
        try:
            result = self.bounded(function, limit, doing=doing)
        except (FileNotFoundError, WriteDenied, OutputError):
            self._succeed()
            raise
        except RemoteError as error:
            self._on_failure()
            if not explicit:
                self._fail(error, is_trial=is_trial)
            raise
        self._succeed()
        return result

    def bounded(self, function: Callable[[], _R], limit: float | Callable[[Future[_R]], str], *, doing: Doing) -> _R:
        """Return the result of a call as `call` does, past the breaker."""
        done: Future[_R] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=run, name="limner-remote", daemon=True)
        thread.start()
        if isinstance(limit, (int, float)):
            problem = "" if wait([done], timeout=limit).done else f"no answer within {limit:g} s"
        else:
            problem = limit(done)
        if problem:
            with self._lock:
                self._abandoned = [*(t for t in self._abandoned if t.is_alive()), thread]
            raise self._remote_error(doing, problem)
        error = done.exception()
        if error is None:
            return done.result()
        if isinstance(error, LimnerError):
            raise error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError from None
        line = self.describe(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and doing == "be read":
            raise OutputError(f"store: no room for what is fetched ({line}); free some space") from None
        if doing in ("be written", "be changed") and isinstance(error, (PermissionError, NotImplementedError)):
            raise WriteDenied(f"remote: {self.url} cannot {doing} ({line})") from None
        raise self._remote_error(doing, line) from None

    def describe(self, error: BaseException) -> str:
        """Return an error in one line, without credentials."""
        text = self.scrub(" ".join(str(error).split()))
        return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

    def scrub(self, text: str) -> str:
        """Return a text without the credentials of the URL."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _remote_error(self, doing: Doing, problem: str) -> RemoteError:
        return RemoteError(
            f"remote: {self.url} cannot {doing} ({problem}); check the address, the credentials in the environment, "
            "and that they may list, read, write and remove there"
        )

    def _enter(self) -> bool:
        """Raise `RemoteError` while the breaker is open. Return True for the one call that tries after a failure."""
        with self._lock:
            now = time.monotonic()
            if now < self._open_until:
                seconds = self._open_until - now
                raise RemoteError(f"remote: {self.url} does not answer, and is left alone for {seconds:.0f} s")
            if self._pause:
                self._open_until = now + self._pause
            return self._pause > 0

    def _check_abandoned(self) -> None:
        with self._lock:
            self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
            if len(self._abandoned) >= _MOST_ABANDONED:
                raise RemoteError(
                    f"remote: {self.url} does not answer: {len(self._abandoned)} calls still wait for it; "
                    "try again later"
                )

    def _succeed(self) -> None:
        with self._lock:
            had_failed, self._pause, self._open_until = self._pause > 0, 0.0, 0.0
            self._abandoned = []
        if had_failed:
            _logger.warning("%s answers again", self.url)

    def _fail(self, error: RemoteError, *, is_trial: bool) -> None:
        with self._lock:
            is_first = not self._pause
            if not is_first and not is_trial:  # of several calls that failed at once, one counts
                return
            self._pause = _FIRST_PAUSE if is_first else min(2 * self._pause, _LAST_PAUSE)
            self._open_until = time.monotonic() + self._pause
        if is_first:
            _logger.warning(
                "%s; it is left alone for a while, and tried again: references are computed meanwhile", error
            )
