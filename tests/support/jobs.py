"""Jobs for tests of their store: made with few words, and what a store has on its disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from limner.config import ReferencePolicy
from limner.images import PreparedReference, prepare_reference
from limner.server.jobs.records import Job
from limner.server.jobs.sqlite import FolderStorage
from limner.server.jobs.store import JobStore
from tests.support.tiny import picture

POLICY = ReferencePolicy()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def reference(seed: int = 0, *, width: int = 64) -> PreparedReference:
    return prepare_reference(picture(width, 64, seed=seed), policy=POLICY)


def job(*pictures: PreparedReference, **values: Any) -> Job:
    given = {"owner": "anna", "prompt": "a", "seeds": (1, 2), **values}
    return Job(**given, references=tuple(p.report for p in pictures))


def folder(store: JobStore) -> Path:
    assert isinstance(store._storage, FolderStorage)
    return store._storage.folder


def sqlite(store: JobStore) -> sqlite3.Connection:
    assert isinstance(store._storage, FolderStorage)
    return store._storage._db


def inputs(store: JobStore) -> set[str]:
    return {name.removesuffix(".png") for name in files(store, "inputs")}


def files(store: JobStore, kind: str) -> set[str]:
    return {name for name, *_ in store._storage.files(kind)}
