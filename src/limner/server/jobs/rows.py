"""Jobs and handles as rows: the tables, and the JSON in their columns.

The names in JSON (`num_steps`, `options`, ...) are those that earlier versions wrote, so their rows can be read.
Knows nothing of connections and files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from limner.images import ReferenceReport
from limner.requests import CONTROL_VALUES
from limner.server.jobs.records import Handle, Job, JobOptions, Status, Webhook

__all__ = ["SCHEMA", "VERSION", "fingerprint", "handle_row", "job_row", "read_handle", "read_job"]

_logger = logging.getLogger("limner.server")
VERSION = 1
SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created {real} NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL,
    ended {real}, expires {real}, result TEXT NOT NULL DEFAULT '{{}}', idempotency TEXT, fingerprint TEXT,
    webhook TEXT, webhook_due {real}, webhook_attempts INTEGER NOT NULL DEFAULT 0, webhook_first {real}
){strict};
CREATE INDEX jobs_by_owner ON jobs (owner, created);
CREATE INDEX jobs_pending ON jobs (created) WHERE status = 'pending';
CREATE INDEX jobs_by_expiry ON jobs (expires) WHERE expires IS NOT NULL;
CREATE INDEX jobs_due ON jobs (webhook_due) WHERE webhook_due IS NOT NULL;
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE TABLE handles (
    owner TEXT NOT NULL, key TEXT NOT NULL, created {real} NOT NULL, described TEXT NOT NULL, PRIMARY KEY (owner, key)
){strict};
CREATE TABLE uses (digest TEXT NOT NULL, "user" TEXT NOT NULL, PRIMARY KEY (digest, "user")){strict};
CREATE INDEX uses_by_user ON uses ("user");
CREATE TABLE spent (owner TEXT PRIMARY KEY, images INTEGER NOT NULL){strict};
"""


def job_row(job: Job) -> tuple[Any, ...]:
    """Return the values of id, owner, created, status, request, idempotency, fingerprint and webhook of a new job."""
    return (
        job.id,
        job.owner,
        job.created,
        job.status,
        json.dumps(_request(job)),
        job.idempotency,
        fingerprint(job) if job.idempotency else None,
        json.dumps(asdict(job.webhook)) if job.webhook else None,
    )


_COLUMNS = 14
"""Columns of the table `jobs`. A newer version may have added others after them."""
_STATUSES = frozenset(get_args(Status))
_NAMES = frozenset(
    {
        "prompt",
        "seeds",
        "drawn_seeds",
        "width",
        "height",
        "num_steps",
        "priority",
        "timeout",
        "tolerance",
        "output_format",
        "quality",
        "options",
        "references",
        "control",
        "guidance_scale",
        "negative_prompt",
        "mask",
    }
)
"""Names of what `_request` writes, and `mask`, which earlier versions wrote of pictures that were drawn whole."""
_CONTROL = frozenset({*CONTROL_VALUES, "canvas", "mask"})
_OPTIONS = frozenset({"base_url", "handle", "references_checked", "without_effect"})


def read_job(row: tuple[Any, ...]) -> Job:
    """Return the job of a whole row of the table `jobs`: set aside where this version cannot read it."""
    try:
        return _read_job(row)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        id_, owner, created, *_ = row
        _report_once(id_, f"{type(error).__name__}: {error}")
        return Job(id=id_, owner=owner, created=created, prompt="", seeds=(), set_aside=True)


@functools.lru_cache(1000)
def _report_once(id: str, problem: str) -> None:
    _logger.error("job %s is set aside, since it cannot be read (%s); the version that wrote it can", id, problem)


def _read_job(row: tuple[Any, ...]) -> Job:
    (id_, owner, created, status, request, ended, expires, result, idempotency, _, webhook, _, attempts, first) = row[
        :_COLUMNS
    ]
    values = json.loads(request)
    if status not in _STATUSES:
        raise ValueError(f"its status is {status!r}")
    control = dict(values.get("control", {}))
    if "mask" in values:  # its edge was not softened
        control |= {"mask": values["mask"], "mask_blur": 0}
    unknown = {
        *(values.keys() - _NAMES),
        *(values["options"].keys() - _OPTIONS),
        *(f"control {name}" for name in control.keys() - _CONTROL),
    }
    if status == "pending" and unknown:  # it asks for something that would not be done
        raise ValueError(f"it has {', '.join(sorted(unknown))}")
    return Job(
        id=id_,
        owner=owner,
        created=created,
        status=status,
        prompt=values["prompt"],
        seeds=tuple(values["seeds"]),
        drawn_seeds=values["drawn_seeds"],
        width=values["width"],
        height=values["height"],
        num_inference_steps=values["num_steps"],
        guidance_scale=values.get("guidance_scale"),
        negative_prompt=values.get("negative_prompt"),
        priority=values["priority"],
        timeout=values["timeout"],
        tolerance=values["tolerance"],
        output_format=values["output_format"],
        quality=values["quality"],
        options=_read_options(values["options"]),
        references=_read_reports(values["references"]),
        control={name: value for name, value in control.items() if name in CONTROL_VALUES},
        canvas=_read_reports([control["canvas"]])[0] if "canvas" in control else None,
        mask=_read_reports([control["mask"]])[0] if "mask" in control else None,
        ended=ended,
        expires=expires,
        result=json.loads(result),
        idempotency=idempotency,
        webhook=Webhook(**json.loads(webhook)) if webhook else None,
        webhook_attempts=attempts,
        webhook_first=first,
    )


def fingerprint(job: Job) -> str:
    """Return a digest that is equal for equal requests. Seeds that the server drew count by their number alone."""
    values = _request(job)
    del values["options"]
    values["references"] = [report.digest for report in job.references]
    if "control" in values:
        reports = {name: one.digest for name, one in (("canvas", job.canvas), ("mask", job.mask)) if one is not None}
        values["control"] |= reports
    values["seeds"] = len(job.seeds) if job.drawn_seeds else job.seeds
    values["webhook"] = asdict(job.webhook) if job.webhook else None
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _request(job: Job) -> dict[str, Any]:
    newer = {  # older versions read jobs that have none of these
        "control": _control(job) or None,
        "guidance_scale": job.guidance_scale,
        "negative_prompt": job.negative_prompt,
    }
    return {
        "prompt": job.prompt,
        "seeds": job.seeds,
        "drawn_seeds": job.drawn_seeds,
        "width": job.width,
        "height": job.height,
        "num_steps": job.num_inference_steps,
        "priority": job.priority,
        "timeout": job.timeout,
        "tolerance": job.tolerance,
        "output_format": job.output_format,
        "quality": job.quality,
        "options": _options(job.options),
        "references": [report.as_stored() for report in job.references],
        **{name: value for name, value in newer.items() if value is not None},
    }


def _control(job: Job) -> dict[str, Any]:
    """Return what a job asks for beyond prompt and references; an older version sets a job with any of it aside."""
    pictures = {name: one.as_stored() for name, one in (("canvas", job.canvas), ("mask", job.mask)) if one is not None}
    return {**job.control, **pictures}


def _options(options: JobOptions) -> dict[str, Any]:
    """Return the options that are set; `references_checked` means nothing without a handle."""
    found: dict[str, Any] = {}
    if options.base_url is not None:
        found["base_url"] = options.base_url
    if options.handle is not None:
        found |= {"handle": options.handle, "references_checked": options.references_checked}
    if options.without_effect:
        found["without_effect"] = options.without_effect
    return found


def _read_options(values: Mapping[str, Any]) -> JobOptions:
    return JobOptions(
        base_url=values.get("base_url"),
        handle=values.get("handle"),
        references_checked=values.get("references_checked", False),
        without_effect=tuple(values.get("without_effect", ())),
    )


def handle_row(handle: Handle) -> tuple[Any, ...]:
    """Return the row of a handle in the table `handles`."""
    described: dict[str, Any] = {"tolerance": handle.tolerance}
    if handle.nbytes is not None:
        described |= {"nbytes": handle.nbytes, "prefill_seconds": handle.prefill_seconds}
    described |= {"num_tokens": handle.num_tokens, "references": [report.as_stored() for report in handle.references]}
    return handle.owner, handle.key, handle.created, json.dumps(described)


def read_handle(row: tuple[Any, ...]) -> Handle | None:
    """Return the handle of a whole row of the table `handles`; None where this version cannot read it."""
    try:
        return _read_handle(row)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        _report_once(f"of handle {row[1]}", f"{type(error).__name__}: {error}")
        return None


def _read_handle(row: tuple[Any, ...]) -> Handle:
    owner, key, created, described = row[:4]
    values = json.loads(described)
    return Handle(
        owner=owner,
        key=key,
        created=created,
        references=_read_reports(values["references"]),
        num_tokens=values["num_tokens"],
        tolerance=values.get("tolerance"),
        nbytes=values.get("nbytes"),
        prefill_seconds=values.get("prefill_seconds"),
    )


def _read_reports(found: Sequence[Mapping[str, Any]]) -> tuple[ReferenceReport, ...]:
    """Return reports from JSON, which has no tuples."""
    return tuple(
        ReferenceReport(
            original_size=tuple(values["original_size"]),
            oriented=values["oriented"],
            resized_to=tuple(values["resized_to"]) if values["resized_to"] else None,
            cut=tuple(values["cut"]),
            processed_size=tuple(values["processed_size"]),
            digest=values["digest"],
            added=tuple(values.get("added", (0, 0, 0, 0))),
            upright_size=tuple(values["upright_size"]) if values.get("upright_size") else None,
            profile=values.get("profile"),
            origin=tuple(values.get("origin", (0, 0))),
        )
        for values in found
    )
