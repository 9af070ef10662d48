"""Many pictures from one manifest: what to draw, in which order, and what is done already.

Owns the folder of results, resuming, and the order of work: rows are grouped by the content of
their references, so that each list of references is prefilled once. Knows nothing of processes, clusters or terminals: who
draws the groups is the caller's choice, `Batch.draw` in this process or `limner.deploy.ray_batch` in many.

    MANIFEST             rows (`limner.batch.manifest`)
    DIR/<id>.png         a picture; there as soon as it is named in the results
    DIR/results.jsonl    while running, one line for each row that ended, in the order in which they did; at the end one
                         line a row in the order of the manifest
    DIR/.limner-batch/   until the end: kept K/V, what each process did, files that are being written

A row is done when its line is on disk. A process that is killed loses the rows it was drawing, nothing else: the same
command goes on from there. A row is drawn again if it failed, if its picture is not the one that was written, or if its
fingerprint changed (prompt, references, seed, size, steps, weights, arithmetic, format).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from limner import __version__
from limner.batch.manifest import BrokenRow, Row, check_number, read_manifest
from limner.errors import Conflict, InvalidRequest, LimnerError, OutputError
from limner.files import write_file
from limner.images import FORMATS, ReferenceReport, encode, prepare_reference
from limner.pipeline import Pipeline, PipelineOutput
from limner.places import check_store
from limner.references import References
from limner.store import ReferenceStore

__all__ = [
    "ENDINGS",
    "Batch",
    "BatchOptions",
    "BatchSummary",
    "Drawer",
    "Group",
    "Journal",
    "Result",
    "Task",
    "finished_rows",
    "is_whole",
]

_logger = logging.getLogger("limner")
Result = dict[str, Any]
"""What is told of a row, as it stands in the results."""
ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Formats of pictures and the ending of their files."""
_HIDDEN, _LOCK, _RESULTS = ".limner-batch", ".limner-batch.lock", "results.jsonl"
_TEXT_ONLY_AT_ONCE = 16
"""Rows without references share nothing: so many make a group, that there is work for all who draw."""


# what is to be drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A row that is to be drawn: all that its picture depends on, but the references of its group."""

    id: str
    line: int
    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    file: str
    fingerprint: str
    references: tuple[dict[str, Any], ...]
    """What became of each reference, for the results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rows with equal references, by size. `files` are those of its first row; `digests` what they have to be."""

    files: tuple[str, ...]
    digests: tuple[str, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """Where rows come from and results go. `store` None keeps K/V in a hidden folder of `folder` until the end.

    `store` is a folder, or a URL with perhaps a folder `store_cache` of each machine before it.

    `images_at_once` rows of equal references and size are drawn side by side: faster on some devices, and a picture then
    depends on its neighbours by rounding. With 1, each is bit for bit what `limner edit` makes of its row.
    """

    manifest: Path
    folder: Path
    format: str = "png"
    images_at_once: int = 1
    store: str | Path | None = None
    store_bytes: int | None = None
    store_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.format not in ENDINGS:
            raise InvalidRequest("format", f"{self.format!r} is not one of {', '.join(ENDINGS)}")
        check_store(self.store, cache=self.store_cache, disk_bytes=self.store_bytes)
        check_number("images_at_once", self.images_at_once, low=1, high=1000)

    @property
    def hidden(self) -> Path:
        return self.folder / _HIDDEN

    def open_store(self) -> ReferenceStore:
        """Kept beyond memory alone: a group is drawn with the References in hand and then never asked for again."""
        if self.store is None:
            return ReferenceStore(memory_bytes=0, disk_path=self.hidden / "store", disk_bytes=None)
        return ReferenceStore.open(self.store, cache=self.store_cache, disk_bytes=self.store_bytes, memory_bytes=0)


# files


class Journal:
    """A file of JSON lines that only grows; a line is on disk when `append` returns. Raises `OutputError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab")
            _end_after_last_line(path)
        except OSError as error:
            raise self._failure(error) from error

    def append(self, values: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left in the buffer is what append failed to write
            self._file.close()

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"output: {self.path} cannot be written ({error.strerror or error})")


def _end_after_last_line(path: Path) -> None:
    """Cuts off what a process wrote of a line that was killed then."""
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal. Raises `InvalidRequest` if they are not those of one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidRequest("output", f"{path} cannot be read ({error.strerror or error})") from error
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f"a {type(values).__name__}")
            if "prefill" not in values and values["status"] not in ("ok", "error"):
                raise ValueError(f"status {values['status']!r}")
            if values.get("status") == "ok" and not all(
                isinstance(values[name], str) for name in ("id", "file", "sha256", "fingerprint")
            ):
                raise ValueError("not all its fields are texts")
        except (ValueError, KeyError, RecursionError) as error:
            raise InvalidRequest(
                "output",
                f"line {number} of {path} is no result of a batch ({error}); move the file away, or give "
                "another folder",
            ) from None
        yield values


def finished_rows(options: BatchOptions) -> dict[tuple[str, str], Result]:
    """Rows that were drawn in this folder, by id and fingerprint; whether their files are still there is not checked."""
    paths = [options.folder / _RESULTS, *sorted(options.hidden.glob("journal-*.jsonl"))]
    return {
        (values["id"], values["fingerprint"]): values
        for path in paths
        for values in _lines(path)
        if values.get("status") == "ok"
    }


def is_whole(folder: Path, result: Result) -> bool:
    """Whether the picture of a result is the one that was written."""
    try:
        return bool(hashlib.sha256((folder / result["file"]).read_bytes()).hexdigest() == result["sha256"])
    except (OSError, ValueError):
        return False


# drawing


class Drawer:
    """Draws groups with one pipeline and writes their pictures; each process has one."""

    def __init__(self, pipe: Pipeline, options: BatchOptions, *, keep_rows: bool) -> None:
        """`keep_rows`: results go to this process's journal too, for whoever collects them may be killed before."""
        self.pipe, self.options, self.keep_rows = pipe, options, keep_rows
        self.model = pipe.digest
        self.journal = Journal(options.hidden / f"journal-{secrets.token_hex(8)}.jsonl")

    def close(self) -> None:
        self.journal.close()
        self.pipe.store.flush()

    def draw(self, group: Group) -> Iterator[Result]:
        """Draws rows one after another and gives the result of each. An error is that of a row.

        Raises `OutputError`: what cannot be written now cannot be written for the next row either.
        """
        try:
            references, source = self._prefill(group)
        except OutputError:
            raise
        except Exception as error:
            for task in group.tasks:
                yield self._ended(_failed(task, error))
            return
        for chunk in _chunks(group.tasks, self.options.images_at_once):
            for result in self._draw(chunk, references, source):
                yield self._ended(result)
            source = "memory" if references is not None else "none"

    def _ended(self, result: Result) -> Result:
        if self.keep_rows:
            self.journal.append(result)
        return result

    def _prefill(self, group: Group) -> tuple[References | None, str]:
        if not group.files:
            return None, "none"
        prepared = [
            prepare_reference(file, policy=self.pipe.reference_policy, field=f"image {i}")
            for i, file in enumerate(group.files, start=1)
        ]
        if tuple(picture.report.digest for picture in prepared) != group.digests:
            raise InvalidRequest("references", "a file changed while the batch ran; run it again")
        references, source = self.pipe.prefill_from(prepared)
        if source == "miss":
            self.journal.append({"prefill": references.key, "seconds": round(references.prefill_seconds, 4)})
            self.pipe.store.put(references)  # whatever reading costs: a run that goes on shall not prefill again
        return references, source

    def _draw(self, chunk: Sequence[Task], references: References | None, source: str) -> Iterator[Result]:
        """Rows of one size side by side; if they fail together, each alone."""
        start = time.perf_counter()
        try:
            out = self.pipe(
                chunk[0].prompt if len(chunk) == 1 else [task.prompt for task in chunk],
                references=references,
                width=chunk[0].width,
                height=chunk[0].height,
                num_inference_steps=chunk[0].steps,
                generator=[torch.Generator().manual_seed(task.seed) for task in chunk],
            )
        except Exception as error:
            if len(chunk) == 1:
                yield _failed(chunk[0], error)
                return
            for task in chunk:
                yield from self._draw([task], references, source)
                source = "memory" if references is not None else "none"
            return
        assert not isinstance(out, tuple)
        seconds = (time.perf_counter() - start) / len(chunk)
        for number, task in enumerate(chunk):
            picture = self._write(task, out, number)
            cache = source if number == 0 or source == "none" else "memory"
            yield {
                "line": task.line,
                "id": task.id,
                "status": "ok",
                **picture,
                "seed": task.seed,
                "size": f"{task.width}x{task.height}",
                "steps": task.steps,
                "prompt_cut": out.prompts[number].cut,
                "references": list(task.references),
                "reference_cache": cache,
                "reference_key": out.reference_key,
                "seconds": round(seconds, 4),
                "fingerprint": task.fingerprint,
            }

    def _write(self, task: Task, out: PipelineOutput, number: int) -> Result:
        """The picture, with the metadata that `limner edit` gives it; whole or not at all."""
        metadata = {"prompt": task.prompt, "seed": task.seed, "model": self.model, "version": __version__}
        data = encode(out.images[number], FORMATS[Path(task.file).suffix], metadata={**metadata, **out.metadata})
        _write_whole(self.options, task.file, data)
        return {"file": task.file, "sha256": hashlib.sha256(data).hexdigest()}


def _write_whole(options: BatchOptions, name: str, data: bytes) -> None:
    """Writes a file of the folder by way of the hidden one, where nothing that is half written stays for long."""
    part = options.hidden / f"part-{secrets.token_hex(8)}"
    write_file(part, data)
    try:
        os.replace(part, options.folder / name)
    except OSError as error:
        raise OutputError(f"output: {options.folder / name} cannot be written ({error.strerror or error})") from error


def _chunks(tasks: Iterable[Task], most: int) -> Iterator[list[Task]]:
    """Neighbours of equal size and steps, at most so many."""
    chunk: list[Task] = []
    for task in tasks:
        same = chunk and (task.width, task.height, task.steps) == (chunk[0].width, chunk[0].height, chunk[0].steps)
        if chunk and (not same or len(chunk) == most):
            yield chunk
            chunk = []
        chunk.append(task)
    if chunk:
        yield chunk


def _failed(task: Task, error: Exception) -> Result:
    if not isinstance(error, LimnerError):  # nobody's mistake in the manifest: say where it came from
        _logger.error("row %s: %s: %s", task.id, type(error).__name__, error, exc_info=error)
    return _error(line=task.line, id=task.id, error=error)


def _error(*, line: int, id: str | None, error: Exception) -> Result:
    told = {"type": type(error).__name__, "message": " ".join(str(error).split())}
    return {"line": line, "id": id, "status": "error", "error": told}


# a run


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """A run that reached its end. `rows` = `drawn` now + `done_before` + `failed`.

    `prefills` counts this run's, `prefills_in_all` those of every run since the folder was last complete.
    """

    rows: int
    drawn: int
    done_before: int
    failed: int
    prefills: int
    prefills_in_all: int
    seconds: float
    images_per_second: float
    results: str

    def describe(self) -> str:
        """One line for people."""
        before = f", {self.done_before} done before" if self.done_before else ""
        return (
            f"{self.results}: {self.rows} rows: {self.drawn} drawn{before}, {self.failed} failed; "
            f"{self.prefills} prefills, {self.seconds:.1f} s, {self.images_per_second:.2f} images/s"
        )


class Batch:
    """One run over one manifest into one folder, which it holds alone. Use it as a context manager.

    `progress(done, of, failed)` hears of every row. Raises `InvalidRequest`, `Conflict` and `OutputError`.
    """

    def __init__(self, options: BatchOptions, *, progress: Callable[[int, int, int], None] | None = None) -> None:
        self.rows = read_manifest(options.manifest)
        self.options = replace(options, folder=Path(os.path.abspath(options.folder)))
        self._progress = progress or _silent
        self._lock = self._take_folder()
        self._errors: dict[int, Result] = {}
        self._done: dict[str, Result] = {}
        self.model = ""
        """Digest of all weights; known when the rows are planned."""
        self._drawn = self._done_before = 0
        self._missing: dict[tuple[str, ...], set[str]] = {}
        """Rows of each list of references that are not drawn yet: its K/V go with the last one."""
        self._group_of: dict[str, tuple[str, ...]] = {}
        try:
            self._start = time.perf_counter()
            self._prefills_before = self._count_prefills()
            self._finished = finished_rows(self.options)
            self.store = self.options.open_store()
            self._results = Journal(self.options.folder / _RESULTS)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()
        self.store.flush()
        self._lock.close()

    def _take_folder(self) -> BinaryIO:
        folder = self.options.folder
        try:
            self.options.hidden.mkdir(parents=True, exist_ok=True)
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

    def _count_prefills(self) -> int:
        return sum("prefill" in line for path in self.options.hidden.glob("journal-*.jsonl") for line in _lines(path))

    # planning

    def plan(self, pipe: Pipeline) -> list[Group]:
        """The groups that are left to be drawn, in the order of their first rows; broken rows are recorded as failed."""
        base = Path(self.options.manifest).absolute().parent
        known: dict[str, ReferenceReport | InvalidRequest] = {}

        def report(name: str) -> ReferenceReport:
            path = str(base / name)
            if path not in known:
                try:
                    known[path] = prepare_reference(path, policy=pipe.reference_policy, field="references").report
                except InvalidRequest as error:
                    known[path] = error
            found = known[path]
            if isinstance(found, InvalidRequest):
                raise found
            return found

        self.model = pipe.digest
        groups: dict[tuple[str, ...], list[tuple[Row, Task]]] = {}
        for row in self.rows:
            if isinstance(row, BrokenRow):
                self.record(_error(line=row.line, id=row.id, error=row.error))
                continue
            try:
                reports = [report(name) for name in row.references]
                task = self._task(row, reports, pipe)
            except InvalidRequest as error:
                self.record(_error(line=row.line, id=row.id, error=error))
                continue
            found = self._finished.get((task.id, task.fingerprint))
            if found is not None and found["file"] == task.file and is_whole(self.options.folder, found):
                self._done[row.id] = {**found, "line": row.line}
                self._done_before += 1
            else:
                digests = tuple(report.digest for report in reports)
                groups.setdefault(digests, []).append((row, task))
                self._missing.setdefault(digests, set()).add(row.id)
                self._group_of[row.id] = digests
        self._tell()
        return [group for digests, members in groups.items() for group in _groups(digests, members, base)]

    def _task(self, row: Row, reports: Sequence[ReferenceReport], pipe: Pipeline) -> Task:
        width, height = row.size or (reports[0].processed_size if reports else pipe.default_size)
        file = row.id + ENDINGS[self.options.format]
        if (self.options.folder / file).is_dir():
            raise InvalidRequest("id", f"{self.options.folder / file} is a folder; move it away")
        parts = {
            "prompt": row.prompt,
            "seed": row.seed,
            "size": [width, height],
            "steps": row.steps,
            "file": file,
            "references": [report.digest for report in reports],
            "model": self.model,
            "dtype": str(pipe.dtype),
            "kv_cache_dtype": pipe.kv_cache_dtype,
        }
        return Task(
            id=row.id,
            line=row.line,
            prompt=row.prompt,
            seed=row.seed,
            width=width,
            height=height,
            steps=row.steps,
            file=file,
            fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
            references=tuple(
                {"file": name, **asdict(report)} for name, report in zip(row.references, reports, strict=True)
            ),
        )

    # running

    def draw(self, pipe: Pipeline, groups: Iterable[Group]) -> None:
        """Draws groups in this process. `pipe` has the store of this batch."""
        drawer = Drawer(pipe, self.options, keep_rows=False)
        try:
            for group in groups:
                for result in drawer.draw(group):
                    self.record(result)
        finally:
            drawer.close()

    def record(self, result: Result) -> None:
        """Takes the result of a row: it is on disk when this returns. A second one of a row that is done is not taken."""
        if result["id"] in self._done:
            return
        self._results.append(result)
        if result["status"] == "error":
            self._errors[result["line"]] = result
        else:
            self._done[result["id"]] = result
            self._drawn += 1
            digests = self._group_of[result["id"]]
            self._missing[digests].discard(result["id"])
            key = result["reference_key"]
            if not self._missing[digests] and key is not None and self.options.store is None:
                self.store.remove(key)
        self._tell()

    def _tell(self) -> None:
        self._progress(len(self._done) + len(self._errors), len(self.rows), len(self._errors))

    @property
    def num_done(self) -> int:
        """Rows whose pictures are there."""
        return len(self._done)

    @property
    def failures(self) -> list[Result]:
        """Rows that failed in this run, in the order of the manifest."""
        return [self._errors[line] for line in sorted(self._errors)]

    def finish(self) -> BatchSummary:
        """Puts the results into the order of the manifest and removes what only a run that goes on would need."""
        lines = []
        for row in self.rows:
            result = self._errors.get(row.line) or self._done.get(row.id or "")
            assert result is not None, f"line {row.line} has no result"
            lines.append(json.dumps(result) + "\n")
        gone = {id for id, _ in self._finished} - {row.id for row in self.rows}
        if gone:
            _logger.warning(
                "%d rows of earlier runs are not in the manifest: they leave the results, files stay", len(gone)
            )
        seconds = time.perf_counter() - self._start
        prefills = self._count_prefills()
        self._results.close()
        self.store.flush()
        _write_whole(self.options, _RESULTS, "".join(lines).encode())
        shutil.rmtree(self.options.hidden, ignore_errors=True)
        return BatchSummary(
            rows=len(self.rows),
            drawn=self._drawn,
            done_before=self._done_before,
            failed=len(self._errors),
            prefills=prefills - self._prefills_before,
            prefills_in_all=prefills,
            seconds=round(seconds, 2),
            images_per_second=round(self._drawn / seconds, 3) if seconds else 0.0,
            results=str(self.options.folder / _RESULTS),
        )


def _groups(digests: tuple[str, ...], members: list[tuple[Row, Task]], base: Path) -> Iterator[Group]:
    """One group for equal references, ordered by size; several for rows without any."""
    sizes = list(dict.fromkeys((task.width, task.height, task.steps) for _, task in members))
    tasks = sorted((task for _, task in members), key=lambda task: sizes.index((task.width, task.height, task.steps)))
    files = tuple(str(base / name) for name in members[0][0].references)
    step = len(tasks) if files else _TEXT_ONLY_AT_ONCE
    for start in range(0, len(tasks), step):
        yield Group(files=files, digests=digests, tasks=tuple(tasks[start : start + step]))


def _silent(done: int, of: int, failed: int) -> None:
    """The progress of callers that do not ask for it."""
