"""How the file descriptors of the process are shared: connections of callers, and what jobs need. Knows no HTTP."""

from __future__ import annotations

import contextlib
import os
import resource

__all__ = ["max_connections", "max_streams", "raise_limit", "reserved"]

_ENOUGH = 16384


def raise_limit() -> None:
    """Let the process open as many files as it may, up to what a service can use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def reserved() -> int:
    """Number of descriptors that callers' connections leave to jobs: their files, webhooks, pictures by URL."""
    return min(256, _limit() // 3)


def max_connections() -> int:
    """Number of connections that callers may have at once: what the limit of open files leaves beside all others."""
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    return max(8, min(4096, _limit() - used - reserved()))


def max_streams() -> int:
    """Number of event streams that may be open at once: half of the connections, so that others can be made."""
    return max_connections() // 2


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH if soft == resource.RLIM_INFINITY else min(soft, _ENOUGH)
