"""A job as answers and webhooks show it, in the words of the hosted dialect."""

from __future__ import annotations

import base64
from typing import Any

from limner.server.jobs.records import Job
from limner.server.jobs.updates import Update

__all__ = ["STATUSES", "as_result", "cache_report", "controls"]

STATUSES = {
    "pending": "Pending",
    "ready": "Ready",
    "error": "Error",
    "cancelled": "Error",
    "request_moderated": "Request Moderated",
    "content_moderated": "Content Moderated",
}
_SET_ASIDE = {
    "state": "set aside",
    "reason": "another version of the server wrote this job, which this one cannot read; it goes on when that one runs",
}
_REPORTED = (
    "reference_cache",
    "reference_key",
    "seconds_saved",
    "references",
    "prompt",
    "warnings",
    "timings",
    "waited",
    "ran",
    "batch",
    "encode_seconds",
    "canvas",
    "loras",
    "preserved",
)


def as_result(job: Job, urls: list[str], update: Update | None) -> dict[str, Any]:
    """Return a job in the shape of get_result; `urls` are those of its pictures, `update` is how far it is."""
    answer: dict[str, Any] = {
        "id": job.id,
        "status": STATUSES[job.status],
        "result": None,
        "progress": None,
        "details": None,
        "preview": None,
    }
    if job.set_aside:
        return answer | {"details": _SET_ASIDE}
    if job.status == "pending":
        return answer | _pending(update)
    answer["progress"] = 1.0
    if job.status == "ready":
        answer["result"] = _ready(job, urls)
    elif "finding" in job.result:
        finding = job.result["finding"]
        answer["details"] = {"Moderation Reasons": [finding["category"]], "reason": finding["reason"]}
    else:
        answer["details"] = {"error": job.result.get("error", ""), "type": job.result.get("type", "failed")}
    return answer


def _pending(update: Update | None) -> dict[str, Any]:
    if update is None:
        return {"progress": 0.0}
    found: dict[str, Any] = {
        "progress": round(update.progress, 4),
        "details": {"state": update.state, "step": update.step, "num_steps": update.num_inference_steps},
    }
    if update.previews:
        shown = ["data:image/png;base64," + base64.b64encode(data).decode() for data in update.previews]
        found["preview"] = {"images": shown}
    return found


def _ready(job: Job, urls: list[str]) -> dict[str, Any]:
    report = job.result
    return {
        "sample": urls[0],
        "samples": urls,
        "prompt": job.prompt,
        "seed": report["seeds"][0],
        "seeds": report["seeds"],
        "start_time": job.created,
        "end_time": job.ended,
        "duration": (job.ended or job.created) - job.created,
        "width": report["width"],
        "height": report["height"],
        "expires": job.expires,
        "limner": cache_report(job),
    }


def controls(job: Job) -> dict[str, Any] | None:
    """Return what a job was asked beyond prompt and references, for programs that ask it again; None: nothing."""
    pictures = {name: True for name, one in (("mask", job.mask), ("canvas", job.canvas)) if one is not None}
    return {**pictures, **job.control} or None


def cache_report(job: Job) -> dict[str, Any]:
    """Return how a ready job was drawn: whether its references were cached, what that saved, timings, and what was kept.

    `without_effect` names fields of the request that were not followed, if there are any.
    """
    told = {name: job.result[name] for name in _REPORTED if name in job.result}
    names = job.options.without_effect
    return told | ({"without_effect": list(names)} if names else {})
