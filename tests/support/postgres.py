"""A PostgreSQL of this machine for tests: a cluster of its own in a temporary folder, on a socket and a port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:] or (
    [Path(found).parent] if (found := shutil.which("initdb")) else []
)
WHY = "there is no PostgreSQL; apt-get install postgresql"


class Server:
    """A server that may be stopped, killed and started again; `url(name)` is a new database of it."""

    def __init__(self) -> None:
        assert PROGRAMS, WHY
        self.folder = Path(tempfile.mkdtemp(prefix="limner-postgres-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # it does not run as root
            self._as = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self.folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        try:
            self._start()
        except BaseException:
            self.remove()
            raise

    def _start(self) -> None:
        self._call("initdb", "-D", self._data, "-U", "limner", "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
        self._number = 0
        self.start()

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def _call(self, program: str, *args: str, check: bool = True) -> None:
        subprocess.run(
            [PROGRAMS[0] / program, *args],
            check=check,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            timeout=120,
            **self._as,
        )

    def start(self) -> None:
        settings = f"-p {self.port} -k {self.folder} -h 127.0.0.1 -F"
        self._call("pg_ctl", "-D", self._data, "-w", "-l", str(self.folder / "log"), "-o", settings, "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is what a crash leaves."""
        self._call("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop", check=False)

    def url(self) -> str:
        self._number += 1
        name = f"test{self._number}"
        with psycopg.connect(self.at("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self.at(name)

    def at(self, database: str) -> str:
        return f"postgresql://limner:secret@127.0.0.1:{self.port}/{database}"

    def remove(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


def kill_sessions(url: str) -> None:
    """Ends all other connections of a database, as a failing network or a careful administrator would."""
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid != pg_backend_pid()"
        )
    time.sleep(0.05)
