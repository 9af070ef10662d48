"""Draws groups with one pipeline and writes their images.

Owns what happens to a group in one process: one prefill, its rows one after another, an error that is that of a row.
Knows no manifest, and nothing of other processes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from limner.batch.control import renamed, repaints_first, row_warnings
from limner.batch.folder import own_journal, write_whole
from limner.batch.journal import Result, failure
from limner.batch.tasks import BatchOptions, Group, Task, chunks
from limner.errors import InvalidRequest, LimnerError, OutputError
from limner.grid import size_warning
from limner.images import FORMATS, Picture, encode, prepare_references
from limner.mentions import prompt_warnings
from limner.pipeline import Pipeline, PipelineOutput
from limner.pipeline.repaint import ImageReport
from limner.references import References
from limner.requests import EditRequest
from limner.version import __version__

__all__ = ["Drawer"]

_logger = logging.getLogger("limner")


class Drawer:
    """Draws groups with one pipeline; each process has one. Raises `OutputError`."""

    def __init__(self, pipe: Pipeline, options: BatchOptions, *, keep_rows: bool) -> None:
        """`keep_rows`: write results to this process's journal too, in case the process that collects them is killed."""
        self.pipe, self.options, self.keep_rows = pipe, options, keep_rows
        self.model = pipe.digest
        self.journal = own_journal(options)
        self._canvas_keys: set[str] = set()
        """Of canvases that the present group has drawn over."""

    def close(self) -> None:
        self.journal.close()
        self.pipe.store.flush()

    def draw(self, group: Group) -> Iterator[Result]:
        """Draw rows one after another and give the result of each. An error is that of a row.

        Raises `OutputError`: what cannot be written now cannot be written for the next row either.
        """
        for result in self._draw_group(group):
            if self.keep_rows:
                self.journal.append(result)
            yield result

    def _draw_group(self, group: Group) -> Iterator[Result]:
        tasks, first = list(group.tasks), None
        while group.files and first is None and tasks:
            try:
                first = self._first_picture(tasks[0], group)
            except Exception as error:  # of this row: the others may have another mask, or none
                yield _failed(tasks.pop(0), error)
        if not tasks:
            return
        try:
            references, source = self._prefill(group, first)
        except OutputError:
            raise
        except Exception as error:
            for task in tasks:
                yield _failed(task, error)
            return
        for chunk in chunks(tasks, self.options.images_at_once):
            yield from self._draw_together(chunk, references, source)
            source = _next_source(references)
        if self.options.store is None:  # the hidden one holds what is under way
            for key in self._canvas_keys:
                self.pipe.store.remove(key)
        self._canvas_keys.clear()

    def _first_picture(self, task: Task, group: Group) -> Picture:
        """The first reference of a group, as one of its rows has it: cropped or grown, if it is repainted there."""
        return task.opened(self.pipe).references[0] if repaints_first(task.control) else group.files[0]

    def _prefill(self, group: Group, first: Picture | None) -> tuple[References | None, str]:
        """The References of a group, and where they came from. `first`: its first picture; None if it has none."""
        if first is None:
            return None, "none"
        policy = self.pipe.reference_policy
        policy = policy if group.fit is None else replace(policy, fit=group.fit)
        prepared = prepare_references([first, *group.files[1:]], policy=policy)
        if tuple(picture.report.digest for picture in prepared) != group.digests:
            raise InvalidRequest("references", "a file changed while the batch ran; run it again")
        references, source = self.pipe.prefill_from(prepared, loras=group.loras)
        if source == "miss":
            self.journal.append({"prefill": references.key, "seconds": round(references.prefill_seconds, 4)})
            self.pipe.store.put(references)  # whatever reading costs: a run that goes on must not prefill again
        return references, source

    def _draw_together(self, tasks: Sequence[Task], references: References | None, source: str) -> Iterator[Result]:
        """Draw rows of one shape in one call; if they fail together, each alone."""
        start = time.perf_counter()
        try:
            requests = [replace(task.opened(self.pipe), references=()) for task in tasks]  # the group has their K/V
            self._canvas_keys.update(*(self.pipe.canvas_keys(request) for request in requests))
            out = self.pipe.draw(requests, references=references)
        except Exception as error:
            if len(tasks) == 1:
                yield _failed(tasks[0], error)
                return
            for task in tasks:
                yield from self._draw_together([task], references, source)
                source = _next_source(references)
            return
        seconds = (time.perf_counter() - start) / len(tasks)
        for number, task in enumerate(tasks):
            yield self._finish(task, requests[number], out, number, source=source, seconds=seconds)
            source = _next_source(references)

    def _finish(
        self, task: Task, request: EditRequest, out: PipelineOutput, number: int, *, source: str, seconds: float
    ) -> Result:
        """Write the image of a row, and return its result."""
        own = out.references[0].processed_size if out.references else self.pipe.default_size
        return {
            "line": task.line,
            "id": task.id,
            "status": "ok",
            **self._write(task, out, number),
            "seed": task.seed,
            "size": "{}x{}".format(*out.images[number].size),
            "steps": task.num_inference_steps,
            **({"guidance": task.guidance} if task.guidance is not None else {}),
            **_control_report(task, out.own[number]),
            "prompt_cut": out.prompts[number].cut,
            "warnings": [
                *row_warnings(request),
                *prompt_warnings(
                    [task.prompt], num_references=len(task.references), known=self.pipe.text_encoder.known
                ),
                *size_warning(
                    (task.width, task.height),
                    self.pipe.sizes,
                    default=own,
                    over_cap=self.pipe.reference_policy.over_cap,
                    field="size",
                ),
            ],
            "references": list(task.references),
            "reference_cache": source,
            "reference_key": out.reference_key,
            "seconds": round(seconds, 4),
            "fingerprint": task.fingerprint,
        }

    def _write(self, task: Task, out: PipelineOutput, number: int) -> Result:
        """Write an image with the metadata that `limner edit` gives it."""
        metadata = {"prompt": task.prompt, "seed": task.seed, "model": self.model, "version": __version__}
        data = encode(
            out.images[number], FORMATS[Path(task.file).suffix], metadata={**metadata, **out.metadata_of(number)}
        )
        write_whole(self.options, task.file, data)
        return {"file": task.file, "sha256": hashlib.sha256(data).hexdigest()}


def _control_report(task: Task, image: ImageReport) -> dict[str, Any]:
    """Return what a result says of controls: the row's own fields, what was drawn of the canvas, and what was kept."""
    return {
        **task.control,
        **({"repainted": asdict(image.canvas)} if image.canvas is not None else {}),
        **({"preserved": image.preserved.as_json()} if image.preserved is not None else {}),
    }


def _next_source(references: References | None) -> str:
    """Where the References of a group come from, after its first image."""
    return "none" if references is None else "memory"


def _failed(task: Task, error: Exception) -> Result:
    if not isinstance(error, LimnerError):  # not of the manifest: the log says where it came from
        _logger.error("row %s: %s: %s", task.id, type(error).__name__, error, exc_info=error)
    error = renamed(error) if isinstance(error, InvalidRequest) else error
    return failure(error, line=task.line, id=task.id)
