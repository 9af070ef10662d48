"""All attacks by their names. As a program it runs one, and prints what the server answered as JSON.

python -m attacks.catalog NAME URL KEY SECONDS [ORIGIN THAT HANGS]
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from attacks import bodies, connections, files, work
from attacks.target import Target

ATTACKS: dict[str, Callable[[Target], None]] = {
    function.__name__: function
    for function in (
        bodies.names_twice,
        bodies.unknown_fields,
        bodies.large_bodies,
        bodies.large_nonsense,
        bodies.large_forms,
        bodies.crumbs,
        bodies.slow_bodies,
        bodies.slow_large_bodies,
        files.hostile_requests,
        files.scans,
        files.scans_in_limits,
        files.bombs,
        files.large_pictures,
        connections.idle_connections,
        connections.slow_heads,
        connections.idle_streams,
        connections.slow_streams,
        connections.unread_answers,
        connections.handshakes,
        work.jobs,
        work.references,
        work.uploads,
        work.cancelled_jobs,
        work.hanging_webhooks,
        work.heavy_jobs,
    )
}
OF_TLS = ("handshakes",)
"""Attacks of a server that speaks TLS."""


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """The origin of a receiver that accepts connections and answers nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(512)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def main() -> None:
    name, url, key, seconds, *rest = sys.argv[1:]
    os.nice(10)  # the attacker is elsewhere: it is not to take the server's processors
    stop = threading.Event()
    threading.Timer(float(seconds), stop.set).start()
    target = Target(url=url, key=key, stop=stop, hang=rest[0] if rest else None)
    ATTACKS[name](target)
    print(json.dumps(target.statuses), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
