"""The folder of results: its lock, its files, and which rows are done.

    DIR/<id>.png         an image; there as soon as it is named in the results
    DIR/results.jsonl    while running, one line for each row that ended, in the order in which they did; at the end one
                         line a row in the order of the manifest
    DIR/.limner-batch/   until the end: cached K/V, a journal of each process that draws, files that are being written

Knows nothing of manifests or of how rows are drawn.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from limner.batch.journal import Journal, Result, read_journal
from limner.batch.tasks import BatchOptions, Task
from limner.errors import Conflict, InvalidRequest, OutputError
from limner.files import write_file

__all__ = [
    "RESULTS",
    "count_prefills",
    "done_before",
    "finished_rows",
    "is_whole",
    "lock_folder",
    "own_journal",
    "write_whole",
]

RESULTS = "results.jsonl"
_LOCK = ".limner-batch.lock"


def lock_folder(options: BatchOptions) -> BinaryIO:
    """Make the folder and lock it for this process, until the file that is returned is closed.

    Raises `InvalidRequest`, and `Conflict` while another process has it.
    """
    folder = options.folder
    try:
        options.hidden.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("ab")
    except OSError as error:
        raise InvalidRequest(
            "output", f"{folder} cannot be written ({error.strerror or error}); give a folder that you may write to"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Conflict(f"output: another batch runs in {folder}; wait for it, or give another folder") from None
    except OSError as error:
        lock.close()
        raise InvalidRequest("output", f"{folder} cannot be locked ({error.strerror or error})") from error
    return lock


def own_journal(options: BatchOptions) -> Journal:
    """Open a new journal for a process that draws. Raises `OutputError`."""
    return Journal(options.hidden / f"journal-{secrets.token_hex(8)}.jsonl")


def _journals(options: BatchOptions) -> Iterator[Path]:
    return options.hidden.glob("journal-*.jsonl")


def count_prefills(options: BatchOptions) -> int:
    """Count the prefills that processes wrote down since the folder was last complete. Raises `InvalidRequest`."""
    return sum("prefill" in line for path in _journals(options) for line in read_journal(path))


def finished_rows(options: BatchOptions) -> dict[tuple[str, str], Result]:
    """Return the results of rows that were drawn in this folder, by id and fingerprint. Their files are not checked."""
    paths = [options.folder / RESULTS, *sorted(_journals(options))]
    return {
        (values["id"], values["fingerprint"]): values
        for path in paths
        for values in read_journal(path)
        if values.get("status") == "ok"
    }


def is_whole(folder: Path, result: Result) -> bool:
    """Whether the image of a result is still the one that was written."""
    try:
        return bool(hashlib.sha256((folder / result["file"]).read_bytes()).hexdigest() == result["sha256"])
    except (OSError, ValueError):
        return False


def done_before(finished: Mapping[tuple[str, str], Result], task: Task, *, folder: Path) -> Result | None:
    """Return the result of a task that is among `finished` rows with a whole image; None if it has to be drawn."""
    found = finished.get((task.id, task.fingerprint))
    if found is None or found["file"] != task.file or not is_whole(folder, found):
        return None
    return {**found, "line": task.line}


def write_whole(options: BatchOptions, name: str, data: bytes) -> None:
    """Write a file of the folder by way of the hidden one, so that a half-written one does not stay. `OutputError`."""
    part = options.hidden / f"part-{secrets.token_hex(8)}"
    write_file(part, data)
    try:
        os.replace(part, options.folder / name)
    except OSError as error:
        raise OutputError(f"output: {options.folder / name} cannot be written ({error.strerror or error})") from error
