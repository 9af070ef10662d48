"""How a server works: places, limits and switches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from limner.config import BUNDLED_MODEL
from limner.engine.about import ModelAbout
from limner.errors import InvalidRequest
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin
from limner.server.access.limits import LimitPolicy
from limner.server.jobs.settings import RunnerSettings

__all__ = ["ServeSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Settings of a server. Sizes in bytes, times in seconds. `data` is what a `JobStore` opens.

    `public_url` is the address for callers, if it is not the one their requests name. `fetch_urls`: requests may name
    pictures by URL. `webhooks`: jobs may name a URL that their end is reported to. `max_references` limits one job,
    `max_handles` the uploads that are stored for one key. `max_canvas_pixels` are those of a picture that is repainted,
    with what is added to it, times the images of a job. `shared_references`: with keys, an owner is told of K/V that only
    others used. `served_names`: further names of the model; without them it answers to names that clients have built in.
    `about` is what people may read of the model. `browser_origins`: pages of these origins may call the server from a
    browser.
    """

    data: str | Path
    public_url: str | None = None
    max_body_bytes: int = 128 << 20
    max_buffered_bytes: int = 1 << 30
    body_seconds: float = 30.0
    max_picture_bytes: int = 20 << 20
    max_references: int = 16
    max_handles: int = 1000
    max_output_pixels: int = 4 << 20
    max_canvas_pixels: int = 16 << 20
    fetch_urls: bool = False
    webhooks: bool = True
    shared_references: bool = False
    outbound: OutboundPolicy = field(default_factory=OutboundPolicy)
    limits: LimitPolicy = field(default_factory=LimitPolicy)
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    model_name: str = BUNDLED_MODEL
    served_names: tuple[str, ...] = ()
    about: ModelAbout = field(default_factory=ModelAbout)
    browser_origins: frozenset[Origin] = frozenset()

    def check_canvas(self, size: tuple[int, int], *, num_images: int = 1, field: str) -> None:
        """Raise `InvalidRequest` if a picture of this (width, height) is too large to be repainted."""
        if size[0] * size[1] * num_images > self.max_canvas_pixels:
            times, fewer = (f", {num_images} times,", ", or ask for fewer images") if num_images > 1 else ("", "")
            raise InvalidRequest(
                field,
                f"{size[0]}x{size[1]}{times} is over the {self.max_canvas_pixels} pixels that may be repainted; scale it "
                f"down{fewer}",
            )
