"""One run of a batch: its rows, those that are left to draw, and the summary at its end.

Owns resuming, and when cached K/V are removed: with the last row of their references. Knows nothing of processes,
clusters or terminals: the caller chooses who draws the groups, `Batch.draw` in this process or `limner.deploy.ray_batch`
in many.

A row is done when its line is on disk. A process that is killed loses the rows it was drawing and nothing else: the same
command goes on from there. A row is drawn again if it failed, if its image is not the one that was written, or if its
fingerprint changed (prompt, references, seed, size, steps, weights, arithmetic, format).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from limner.batch.control import renamed
from limner.batch.drawer import Drawer
from limner.batch.folder import RESULTS, count_prefills, done_before, finished_rows, lock_folder, write_whole
from limner.batch.journal import Journal, Result, failure
from limner.batch.manifest import BrokenRow, Row, read_manifest
from limner.batch.tasks import BatchOptions, Group, Task, group_tasks, make_task
from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.images import ReferenceReport, prepare_reference
from limner.pipeline import Pipeline

__all__ = ["Batch", "BatchSummary"]

_logger = logging.getLogger("limner")
_Digests = tuple[str, ...]
_Loras = tuple[tuple[str, float], ...]
_Kept = tuple[_Digests, _Loras]
"""What decides, in one run, which K/V a row needs: digests of its references, and of the LoRAs that act on them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """A run that reached its end. `rows` = `drawn` now + `done_before` + `failed`; `warned` of them have warnings.

    `prefills` counts this run's, `prefills_in_all` those of every run since the folder was last complete.
    """

    rows: int
    drawn: int
    done_before: int
    failed: int
    warned: int
    prefills: int
    prefills_in_all: int
    seconds: float
    images_per_second: float
    results: str

    def describe(self) -> str:
        """Return one line for people."""
        before = f", {self.done_before} done before" if self.done_before else ""
        warned = f", {self.warned} with warnings" if self.warned else ""
        return (
            f"{self.results}: {self.rows} rows: {self.drawn} drawn{before}, {self.failed} failed{warned}; "
            f"{self.prefills} prefills, {self.seconds:.1f} s, {self.images_per_second:.2f} images/s"
        )


class Batch:
    """One run over one manifest into one folder, which is locked meanwhile. Use it as a context manager.

    `progress(done, of, failed)` is called after every row. Raises `InvalidRequest`, `Conflict` and `OutputError`.
    """

    def __init__(self, options: BatchOptions, *, progress: Callable[[int, int, int], None] | None = None) -> None:
        self.rows = read_manifest(options.manifest)
        self.options = replace(options, folder=Path(os.path.abspath(options.folder)))
        self._progress = progress or _silent
        self.model = ""
        """Digest of all weights; known when the rows are planned."""
        self._errors: dict[int, Result] = {}
        self._done: dict[str, Result] = {}
        self._drawn = self._done_before = 0
        self._left: dict[_Kept, set[str]] = {}
        """Rows that need the same K/V and are not drawn yet: these are removed with the last one."""
        self._kept: dict[str, _Kept] = {}
        """Which K/V each row needs that was planned."""
        self._lock = lock_folder(self.options)
        try:
            self._start = time.perf_counter()
            self._prefills_before = count_prefills(self.options)
            self._finished = finished_rows(self.options)
            self.store = self.options.open_store()
            self._results = Journal(self.options.folder / RESULTS)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()
        self.store.flush()
        self._lock.close()

    # planning

    def plan(self, pipe: Pipeline) -> list[Group]:
        """Return the groups that are left to draw, in the order of their first rows. Broken rows are recorded as failed."""
        self.model = pipe.digest
        base = Path(self.options.manifest).absolute().parent
        reports = _Reports(base, pipe.reference_policy)
        groups: dict[tuple[_Digests, _Loras | None], list[Task]] = {}
        files: dict[tuple[_Digests, _Loras | None], tuple[str, ...]] = {}
        for row in self.rows:
            planned = self._plan_row(row, pipe, reports)
            if planned is None:
                continue
            task, digests = planned
            group = digests, task.loras  # rows that act alike and are written otherwise are not drawn in one call
            files.setdefault(group, tuple(str(base / reference["file"]) for reference in task.references))
            groups.setdefault(group, []).append(task)
            kept = digests, _acting(task, pipe)
            self._left.setdefault(kept, set()).add(task.id)
            self._kept[task.id] = kept
        self._report()
        return [
            part for group, tasks in groups.items() for part in group_tasks(tasks, files=files[group], digests=group[0])
        ]

    def _plan_row(self, row: Row | BrokenRow, pipe: Pipeline, reports: _Reports) -> tuple[Task, _Digests] | None:
        """The task of a row and the digests of its references; None if it is done, or recorded as failed."""
        try:
            if isinstance(row, BrokenRow):
                raise row.error
            found = [reports.of(name, fit=row.fit) for name in row.references]
            task, digests = make_task(row, found, pipe=pipe, model=self.model, options=self.options)
        except InvalidRequest as error:
            self.record(failure(renamed(error), line=row.line, id=row.id))
            return None
        done = done_before(self._finished, task, folder=self.options.folder)
        if done is not None:
            self._done[task.id] = done
            self._done_before += 1
            return None
        return task, digests

    # running

    def draw(self, pipe: Pipeline, groups: Iterable[Group]) -> None:
        """Draw groups in this process. `pipe` has the store of this batch."""
        drawer = Drawer(pipe, self.options, keep_rows=False)
        try:
            for group in groups:
                for result in drawer.draw(group):
                    self.record(result)
        finally:
            drawer.close()

    def record(self, result: Result) -> None:
        """Take the result of a row, which is on disk when this returns. A second one of a row that is done is ignored."""
        if result["id"] in self._done:
            return
        self._results.append(result)
        if result["status"] == "error":
            self._errors[result["line"]] = result
        else:
            self._done[result["id"]] = result
            self._drawn += 1
            self._remove_references_after(result)
        self._report()

    def _remove_references_after(self, result: Result) -> None:
        """Remove K/V from the hidden store after the last row that needs them."""
        left = self._left[self._kept[result["id"]]]
        left.discard(result["id"])
        key = result["reference_key"]
        if not left and key is not None and self.options.store is None:
            self.store.remove(key)

    def _report(self) -> None:
        self._progress(len(self._done) + len(self._errors), len(self.rows), len(self._errors))

    @property
    def num_done(self) -> int:
        """Rows whose images are there."""
        return len(self._done)

    @property
    def failures(self) -> list[Result]:
        """Rows that failed in this run, in the order of the manifest."""
        return [self._errors[line] for line in sorted(self._errors)]

    @property
    def warned(self) -> list[Result]:
        """Rows whose results have warnings, in the order of the manifest."""
        found = (self._done.get(row.id or "") for row in self.rows)
        return [result for result in found if result is not None and result.get("warnings")]

    def finish(self) -> BatchSummary:
        """Order the results as the manifest is, and remove what only a run that goes on would need."""
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
        prefills = count_prefills(self.options)
        self._results.close()
        self.store.flush()
        write_whole(self.options, RESULTS, "".join(lines).encode())
        shutil.rmtree(self.options.hidden, ignore_errors=True)
        return BatchSummary(
            rows=len(self.rows),
            drawn=self._drawn,
            done_before=self._done_before,
            failed=len(self._errors),
            warned=len(self.warned),
            prefills=prefills - self._prefills_before,
            prefills_in_all=prefills,
            seconds=round(seconds, 2),
            images_per_second=round(self._drawn / seconds, 3) if seconds else 0.0,
            results=str(self.options.folder / RESULTS),
        )


class _Reports:
    """The reports of preparing reference files, each of which is read once."""

    def __init__(self, base: Path, policy: ReferencePolicy) -> None:
        self._base, self._policy = base, policy
        self._known: dict[tuple[str, str], ReferenceReport | InvalidRequest] = {}

    def of(self, name: str, *, fit: str | None) -> ReferenceReport:
        """Return the report of a file, relative to the manifest. Raises `InvalidRequest`."""
        policy = self._policy if fit is None else replace(self._policy, fit=fit)
        key = path, _ = str(self._base / name), policy.fit
        if key not in self._known:
            try:
                self._known[key] = prepare_reference(path, policy=policy, field="references").report
            except InvalidRequest as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, InvalidRequest):
            raise found
        return found


def _acting(task: Task, pipe: Pipeline) -> _Loras:
    """Return digests and strengths of the LoRAs that act on the K/V of a row, however the row names them."""
    if pipe.kind.joint:  # no LoRA changes tokens
        return ()
    own = None if task.loras is None else dict(task.loras)
    loaded = pipe.networks.adapters.loaded
    found = [(lora.digest, lora.strength if own is None else own.get(lora.name, 0.0)) for lora in loaded]
    return tuple(sorted((digest, strength) for digest, strength in found if strength))


def _silent(done: int, of: int, failed: int) -> None:
    """The progress of callers that gave none."""
