"""What a batch draws: one task a row, in groups of equal references, and the options of a run.

Owns how rows become tasks, what decides that a row has to be drawn again (its fingerprint), and the order of work. Knows
neither how tasks are drawn nor what is done already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.batch.manifest import Row, check_number
from limner.errors import InvalidRequest
from limner.images import ReferenceReport
from limner.pipeline import Pipeline
from limner.places import check_store
from limner.store import ReferenceStore

__all__ = ["ENDINGS", "BatchOptions", "Group", "Task", "chunks", "group_tasks", "make_task"]

ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Formats of images and the ending of their files."""
_ROWS_WITHOUT_REFERENCES = 16
"""Rows without references share nothing, so they are divided into groups of this size, for several workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """Where rows come from and results go.

    `store` is a folder, or a URL with an optional folder `store_cache` on each machine; None: a hidden folder in
    `folder`, until the end. `images_at_once` rows of equal references and size are drawn together: faster on some devices,
    but an image then depends on its neighbours by rounding. With 1, each is bit for bit what `limner edit` makes of its
    row. Raises `InvalidRequest`.
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
        """The folder of what is needed until the run ends."""
        return self.folder / ".limner-batch"

    def open_store(self) -> ReferenceStore:
        """Open the store, without memory: a group holds its References while it is drawn, and nobody needs them later."""
        if self.store is None:
            return ReferenceStore(memory_bytes=0, disk_path=self.hidden / "store", disk_bytes=None)
        return ReferenceStore.open(self.store, cache=self.store_cache, disk_bytes=self.store_bytes, memory_bytes=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A row that is to be drawn: all that its image depends on but the references, which are its group's.

    `references` are the reports of preparing them, for the results; `file` is the name of the image.
    """

    id: str
    line: int
    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance: float | None
    negative_prompt: str | None
    file: str
    fingerprint: str
    references: tuple[dict[str, Any], ...]
    fit: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, float | None]:
        """What tasks that are drawn together have in common: width, height, steps and guidance."""
        return self.width, self.height, self.num_inference_steps, self.guidance


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tasks of equal references, by shape. `files` and `fit` are those of the first; `digests` are those of all."""

    files: tuple[str, ...]
    digests: tuple[str, ...]
    tasks: tuple[Task, ...]
    fit: str | None = None


def make_task(
    row: Row, reports: Sequence[ReferenceReport], *, pipe: Pipeline, model: str, options: BatchOptions
) -> Task:
    """Return the task of a row whose references were prepared; `model` is the digest of all weights of `pipe`.

    Raises `InvalidRequest`.
    """
    width, height = row.size or (reports[0].processed_size if reports else pipe.default_size)
    file = row.id + ENDINGS[options.format]
    if (options.folder / file).is_dir():
        raise InvalidRequest("id", f"{options.folder / file} is a folder; move it away")
    steps = row.steps or pipe.kind.num_inference_steps
    parts = {
        "prompt": row.prompt,
        "seed": row.seed,
        "size": [width, height],
        "steps": steps,
        "file": file,
        "references": [report.digest for report in reports],
        "model": model,
        "dtype": str(pipe.dtype),
        "kv_cache_dtype": pipe.kv_cache_dtype,
        **({"guidance": row.guidance} if row.guidance is not None else {}),
        **({"negative_prompt": row.negative_prompt} if row.negative_prompt is not None else {}),
        **({"references_attention": pipe.kind.references} if pipe.kind.joint else {}),
    }
    named = zip(row.references, reports, strict=True)
    return Task(
        id=row.id,
        line=row.line,
        prompt=row.prompt,
        seed=row.seed,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance=row.guidance,
        negative_prompt=row.negative_prompt,
        file=file,
        fit=row.fit,
        fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        references=tuple({"file": name, **report.as_json()} for name, report in named),
    )


def group_tasks(tasks: Sequence[Task], *, files: tuple[str, ...], digests: tuple[str, ...]) -> Iterator[Group]:
    """Give the groups of tasks with equal references, ordered by shape: one, or several if there are no references."""
    shapes = list(dict.fromkeys(task.shape for task in tasks))
    ordered = sorted(tasks, key=lambda task: shapes.index(task.shape))
    step = len(ordered) if files else _ROWS_WITHOUT_REFERENCES
    for start in range(0, len(ordered), step):
        yield Group(files=files, digests=digests, tasks=tuple(ordered[start : start + step]), fit=tasks[0].fit)


def chunks(tasks: Iterable[Task], most: int) -> Iterator[list[Task]]:
    """Give neighbours of equal shape together, at most `most` of them."""
    chunk: list[Task] = []
    for task in tasks:
        if chunk and (task.shape != chunk[0].shape or len(chunk) == most):
            yield chunk
            chunk = []
        chunk.append(task)
    if chunk:
        yield chunk
