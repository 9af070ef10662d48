"""Requests as they are drawn: with their canvases read, and those together that may be.

The one home of two facts: which pictures a request really has as references, and what requests of one batch have in
common. `Pipeline.draw` holds to the latter, queues order by it. Knows no networks and no queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from limner.config import ReferencePolicy
from limner.errors import InvalidRequest
from limner.images import prepare_references
from limner.kinds import ModelKind
from limner.pipeline.canvas import Canvas, open_canvases
from limner.pipeline.control import PerPrompt, check_names
from limner.pipeline.repaint import canvas_sizes
from limner.requests import NOT_OF_CANVAS, Control, EditRequest, read_loras

__all__ = ["canvases_of", "check_shared", "images_of", "opened", "own_size", "per_prompt", "shared_of"]

_OTHERWISE = {"references": "those of the requests differ", "strength": "those of the requests leave out other steps"}
"""What is wrong with values that say nothing to a caller."""


def opened(request: EditRequest, *, policy: ReferencePolicy, sizes: Sequence[tuple[int, int]]) -> EditRequest:
    """Return a request whose canvas and masks were read: its references are the pictures that the model gets.

    A canvas that is cropped or expanded is another picture than the caller's, so keys are those of the opened request. One
    without canvas, or opened before, comes back as it is. `sizes` are those that the model draws; none: any. It reads and
    scales pictures: up to half a second for the largest. Raises `InvalidRequest`.
    """
    check_names(request.control)
    canvases, pictures = open_canvases(
        request.control, request.pictures or None, policy=policy, sizes=sizes, num_prompts=max(1, len(request.seeds))
    )
    if not canvases or isinstance(request.control.get("canvas"), (Canvas, PerPrompt)):
        return request
    control = {name: value for name, value in request.control.items() if name in NOT_OF_CANVAS}
    return replace(
        request,
        references=() if pictures is None else prepare_references(pictures, policy=policy),
        control=cast("Control", {**control, "canvas": PerPrompt(canvases)}),
        canvas=None,
    )


def canvases_of(request: EditRequest) -> tuple[Canvas | None, ...]:
    """Return the canvases of an opened request: one for all of its images, one for each, or () for none."""
    found = request.control.get("canvas")
    return tuple(found) if isinstance(found, PerPrompt) else (found,) if isinstance(found, Canvas) else ()


def images_of(request: EditRequest) -> tuple[Canvas | None, ...]:
    """Return the canvas of each image of an opened request."""
    own = canvases_of(request) or (None,)
    return own if len(own) == len(request.seeds) else own * len(request.seeds)


def own_size(request: EditRequest, *, default_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size in which an opened request is drawn that asks for none; without references `default_size`."""
    sizes = [reference.report.processed_size for reference in request.references]
    return (*canvas_sizes(canvases_of(request)), *sizes, default_size)[0]


def shared_of(request: EditRequest, *, kind: ModelKind, default_size: tuple[int, int]) -> dict[str, Any]:
    """Return what an opened request has in common with those that are drawn with it, by the names of arguments.

    Masks, and weights of references, are each image's own. Strength counts by the steps that it leaves out. LoRAs act at
    the transformer, hence for all. `default_size` is that of a request without references.
    """
    steps = request.num_inference_steps or kind.num_inference_steps
    canvases = canvases_of(request)
    width, height = own_size(request, default_size=default_size)
    return {
        "width": width if request.width is None else request.width,
        "height": height if request.height is None else request.height,
        "num_inference_steps": steps,
        "guidance_scale": kind.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        "reuse": request.reuse,
        "references": tuple(reference.report.digest for reference in request.references),
        "strength": next((canvas.first_step(steps) for canvas in canvases if canvas is not None), 0),
        "reference_guidance": request.control.get("reference_guidance", 1.0),
        "loras": read_loras(request.control.get("loras")),
    }


def check_shared(requests: Sequence[EditRequest], *, kind: ModelKind, default_size: tuple[int, int]) -> EditRequest:
    """Return the first of opened requests that can be drawn together. Raises `InvalidRequest` if they cannot.

    They have a seed at least, and what `shared_of` says in common.
    """
    if not requests:
        raise InvalidRequest("requests", "there are none; give at least one")
    expected: dict[str, Any] = {}
    for request in requests:
        if not request.seeds:
            raise InvalidRequest("seeds", "there are none; give one for each image")
        found = shared_of(request, kind=kind, default_size=default_size)
        expected = expected or found
        for field, value in found.items():
            if value == expected[field]:
                continue
            if field in _OTHERWISE:
                raise InvalidRequest(field, f"{_OTHERWISE[field]}; draw such requests one after another")
            raise InvalidRequest(field, f"{value} and {expected[field]} cannot be drawn together")
    return requests[0]


def per_prompt(requests: Sequence[EditRequest]) -> dict[str, Any]:
    """Return the controls of a call that draws opened requests, each image of which is a prompt."""
    canvases = [canvas for request in requests for canvas in images_of(request)]
    weights = [request.control.get("reference_weights") for request in requests for _ in request.seeds]
    found: dict[str, Any] = {}
    if any(canvas is not None for canvas in canvases):
        found["canvas"] = PerPrompt(canvases)
    if any(weight is not None for weight in weights):
        found["reference_weights"] = PerPrompt(weights)
    shared = dict(requests[0].control)
    return found | {name: shared[name] for name in ("reference_guidance", "loras") if shared.get(name) is not None}
