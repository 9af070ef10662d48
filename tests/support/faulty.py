"""A filesystem of fsspec that hangs or fails in the calls that a test names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from limner import ReferenceStore
from limner.store import Bucket
from tests.support.references import references


class FaultyFileSystem(LocalFileSystem):
    """The local filesystem, that hangs or fails in the calls that a test names."""

    protocol = "faulty"
    problem: dict[str, Callable[[], None]] = {}  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012

    def _meet(self, name: str) -> None:
        self.calls.append(name)
        (self.problem.get(name) or self.problem.get("all") or (lambda: None))()

    def info(self, path: Any, **kwargs: Any) -> Any:
        self._meet("info")
        return super().info(path, **kwargs)

    def ls(self, path: Any, detail: bool = False, **kwargs: Any) -> Any:
        self._meet("ls")
        return super().ls(path, detail=detail, **kwargs)

    def get_file(self, path1: Any, path2: Any, callback: Any = None, **kwargs: Any) -> Any:
        self._meet("get")
        return super().get_file(path1, path2, callback=callback, **kwargs)

    def put_file(self, path1: Any, path2: Any, callback: Any = None, **kwargs: Any) -> Any:
        self._meet("put")
        return super().put_file(path1, path2, callback=callback, **kwargs)

    def mv(self, path1: Any, path2: Any, recursive: bool = True, **kwargs: Any) -> None:
        self._meet("mv")
        super().mv(path1, path2, recursive=recursive, **kwargs)

    def rm_file(self, path: Any) -> None:
        self._meet("rm")
        super().rm_file(path)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).replace("faulty://", "file://", 1)))


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def refuse() -> None:
    raise ConnectionError("the line is cut")


def fill(url: str, *numbers: int) -> None:
    """Entries that another machine made."""
    store = ReferenceStore(remote=url)
    for number in numbers:
        store.put(references(number))
    store.flush()
    assert sorted(store.keys()) == sorted(references(number).key for number in numbers)


def faulty(tmp_path: Path, *, timeout: float = 5.0) -> Bucket:
    return Bucket(f"faulty://{tmp_path}/far", timeout=timeout)
