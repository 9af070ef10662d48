"""Results of jobs: pictures encoded, signed with C2PA where a signer is given, and written to the store.

Knows nothing of the life of a job.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, replace
from typing import Any

from limner import images
from limner.engine import EditResult
from limner.engine.protocol import Backend
from limner.images import SUFFIXES
from limner.mentions import at_card
from limner.requests import warning_with_mask
from limner.server.jobs.known_references import KnownReferences
from limner.server.jobs.offload import Offload
from limner.server.jobs.records import Job
from limner.server.jobs.store import JobStore
from limner.trust import provenance
from limner.trust.provenance import Ingredient, Signer
from limner.version import __version__

__all__ = ["ResultWriter"]

_CARD = "GET /v1/model-card"


class ResultWriter:
    """Write the pictures that an engine drew."""

    def __init__(
        self, *, engine: Backend, jobs: JobStore, offload: Offload, known: KnownReferences, signer: Signer | None
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._offload = offload
        self._known = known
        self._signer = signer

    async def write(self, job: Job, result: EditResult) -> dict[str, Any]:
        """Encode and store the pictures of a job. Return what is stored and answered of the result, as JSON values."""
        started = time.perf_counter()
        files = await self._offload.with_retry(self._encode, job, result)
        suffix = SUFFIXES[job.output_format].removeprefix(".")
        names = await self._offload.with_retry(self._jobs.write_results, job.id, files, suffix=suffix)
        report = _report(await self._for_owner(job.owner, result))
        if result.preserved:
            report |= await self._write_maps(job, result)
        return report | {"files": names, "encode_seconds": round(time.perf_counter() - started, 4)}

    async def _write_maps(self, job: Job, result: EditResult) -> dict[str, Any]:
        """Store what an edit with `preserve` changed of its canvas. Return what is noted of it, with paths."""
        maps = await self._offload.run(lambda: [images.encode(one.change, "png") for one in result.preserved])
        names = await self._offload.with_retry(self._jobs.write_results, job.id, maps, suffix="png", kind="map")
        told = [
            {**one.as_json(), "map": f"/v1/jobs/{job.id}/maps/{number}.png"}
            for number, one in enumerate(result.preserved, start=1)
        ]
        return {"preserved": told, "maps": names}

    async def _for_owner(self, owner: str, result: EditResult) -> EditResult:
        """Return a result as its owner may be told of it: see `KnownReferences`."""
        key = result.reference_key
        if key is None or self._known.is_shared:
            return result
        timings = result.timings
        seconds = timings.references if result.reference_cache == "miss" else result.seconds_saved
        told = await self._known.tell(owner, key, source=result.reference_cache, seconds=seconds)
        result = replace(
            result, seconds_saved=told.saved, batch=len(result.images)
        )  # others of a batch have the same K/V
        if not told.is_changed:
            return result
        ran = result.ran - timings.references + told.seconds
        return replace(result, reference_cache="miss", timings=replace(timings, references=told.seconds), ran=ran)

    def _encode(self, job: Job, result: EditResult) -> list[bytes]:
        files = []
        for number, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
            metadata = {
                "prompt": job.prompt,
                "seed": seed,
                "version": __version__,
                "model": self._model,
                **result.metadata_of(number),
            }
            data = images.encode(image, job.output_format, metadata=metadata, quality=job.quality)
            files.append(data if self._signer is None else self._sign(data, job, metadata, self._signer))
        return files

    def _sign(self, data: bytes, job: Job, metadata: dict[str, Any], signer: Signer) -> bytes:
        titles = [(f"image {number}", report) for number, report in enumerate(job.references, start=1)]
        if job.canvas is not None:  # the first is what the result is made of
            titles.insert(0, ("canvas", job.canvas))
        used = [Ingredient(data=self._jobs.picture_png(report.digest), title=title) for title, report in titles]
        return provenance.sign(
            data,
            format=job.output_format,
            title=f"{job.id}{SUFFIXES[job.output_format]}",
            action="edited" if used else "created",
            ingredients=used,
            metadata=metadata,
            signer=signer,
        )

    @functools.cached_property
    def _model(self) -> str:
        """The digest of the weights; computing it may read all of them."""
        return self._engine.model.digest


def _report(result: EditResult) -> dict[str, Any]:
    controls: dict[str, Any] = {}
    if result.canvas:  # of one request: its pictures are drawn alike
        controls["canvas"] = asdict(result.canvas[0])
    width, height = result.images[0].size  # those of the canvas where it is put back
    return {
        **controls,
        "seeds": list(result.seeds),
        "width": width,
        "height": height,
        "reference_cache": result.reference_cache,
        "reference_key": result.reference_key,
        "seconds_saved": round(result.seconds_saved, 4),
        "loras": result.metadata.get("loras", []),  # an empty list tells that none acted
        "references": [report.as_json() for report in result.references],
        "prompt": asdict(result.prompt),
        "timings": {**asdict(result.timings), "total": result.timings.total},
        "waited": round(result.waited, 4),
        "ran": round(result.ran, 4),
        "batch": result.batch,
        "warnings": [at_card(warning_with_mask(text), _CARD) for text in result.warnings],
    }
