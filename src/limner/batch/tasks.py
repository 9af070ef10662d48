"""What a batch draws: one task a row, in groups of equal references and LoRAs, and the options of a run.

Owns how rows become tasks, what decides that a row has to be drawn again (its fingerprint), and the order of work. Knows
neither how tasks are drawn nor what is done already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from limner.batch.control import canvas_values, open_row, renamed, repaints_first
from limner.batch.manifest import Row, check_number
from limner.errors import InvalidRequest
from limner.images import ReferenceReport
from limner.pipeline import Pipeline
from limner.pipeline.adapters import check_loras
from limner.pipeline.control import check_reference_guidance, check_weights
from limner.pipeline.together import shared_of
from limner.places import check_store
from limner.requests import EditRequest, read_loras
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

    `references` are the reports of preparing them, for the results; `file` is the name of the image. `width` and `height`
    are those in which it is drawn. `shape` is what tasks that are drawn together have in common. `control` are the fields
    of `limner.batch.control`, whose files are below `base`; `repainted` says which canvas and mask they stand for.
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
    shape: tuple[Any, ...] = ()
    control: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    repainted: dict[str, Any] | None = None

    @property
    def loras(self) -> tuple[tuple[str, float], ...] | None:
        """Its own LoRAs; None: as the pipeline is set."""
        return read_loras(self.control.get("loras"))

    @property
    def request(self) -> EditRequest:
        """What it asks the model for, its references and controls aside."""
        return EditRequest(
            prompt=self.prompt,
            seeds=(self.seed,),
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance,
            negative_prompt=self.negative_prompt,
        )

    def opened(self, pipe: Pipeline) -> EditRequest:
        """Return the whole request, its canvas and mask read again; only a canvas is among its references.

        Raises `InvalidRequest`, also if they are no longer what the row was planned with.
        """
        first = self.references[0]["file"] if self.references else None
        found = open_row(self.request, self.control, base=Path(self.base), first=first, pipe=pipe)
        if _json(canvas_values(found)) != _json(self.repainted):
            raise InvalidRequest("mask", "a file changed while the batch ran; run it again")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tasks of equal references and LoRAs, by shape. `files` and `fit` are those of the first, `digests` those of all."""

    files: tuple[str, ...]
    digests: tuple[str, ...]
    tasks: tuple[Task, ...]
    fit: str | None = None

    @property
    def loras(self) -> tuple[tuple[str, float], ...] | None:
        """Those of all; None: as the pipeline is set."""
        return self.tasks[0].loras


def make_task(
    row: Row, reports: Sequence[ReferenceReport], *, pipe: Pipeline, model: str, options: BatchOptions
) -> tuple[Task, tuple[str, ...]]:
    """Return the task of a row whose references were prepared, and the digests of those that the model gets.

    `model` is the digest of all weights of `pipe`. Raises `InvalidRequest`.
    """
    base = Path(options.manifest).absolute().parent
    steps = row.steps or pipe.kind.num_inference_steps
    request = EditRequest(
        prompt=row.prompt,
        seeds=(row.seed,),
        num_inference_steps=steps,
        guidance_scale=row.guidance,
        negative_prompt=row.negative_prompt,
    )
    first = row.references[0] if row.references else None
    opened = open_row(request, row.control, base=base, first=first, pipe=pipe)
    repainted = canvas_values(opened)
    if repaints_first(row.control):
        reports = [opened.references[0].report, *reports[1:]]
    if repainted is not None and row.size is not None:
        raise InvalidRequest("size", "is that of the canvas, and of the result; leave it out")
    shape = _shape(opened, row, reports, pipe)
    width, height = shape[:2]
    file = row.id + ENDINGS[options.format]
    if (options.folder / file).is_dir():
        raise InvalidRequest("id", f"{options.folder / file} is a folder; move it away")
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
        **({"control": row.control, "canvas": repainted} if row.control else {}),
    }
    named = zip(row.references, reports, strict=True)
    task = Task(
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
        shape=shape,
        control=row.control,
        base=str(base),
        repainted=repainted,
        fingerprint=hashlib.sha256(_json(parts).encode()).hexdigest(),
        references=tuple({"file": name, **report.as_json()} for name, report in named),
    )
    return task, tuple(report.digest for report in reports)


def _shape(opened: EditRequest, row: Row, reports: Sequence[ReferenceReport], pipe: Pipeline) -> tuple[Any, ...]:
    """Return what rows that are drawn together have in common, width and height first. Raises `InvalidRequest`."""
    width, height = row.size or (None, None)
    size = reports[0].processed_size if reports else pipe.default_size
    shared = shared_of(replace(opened, width=width, height=height), kind=pipe.kind, default_size=size)
    del shared["references"]  # which are the group's
    steps, control = shared["num_inference_steps"] - shared["strength"], row.control
    try:
        check_weights(control.get("reference_weights"), num_references=len(reports), num_steps=steps)
        check_reference_guidance(control.get("reference_guidance", 1.0), len(reports))
        check_loras(control.get("loras"), loaded=pipe.networks.adapters.loaded)
    except InvalidRequest as error:
        raise renamed(error) from None
    return tuple(shared.values())


def _json(values: object) -> str:
    return json.dumps(values, sort_keys=True)


def group_tasks(tasks: Sequence[Task], *, files: tuple[str, ...], digests: tuple[str, ...]) -> Iterator[Group]:
    """Give the groups of tasks with equal references and LoRAs, ordered by shape: one, or several without references."""
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
