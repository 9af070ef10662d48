"""Latents to pictures, in a call or later. Does not know how the latents were made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner.images import to_pil
from limner.model.autoencoder import Autoencoder
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.networks import Networks
from limner.pipeline.progress import Lap, Stopwatch, silent
from limner.pipeline.repaint import ImageReport, check_result_sizes, finish

__all__ = ["Decoded", "Decoding"]

_DECODED_PIXELS = 1024 * 1024
"""Pictures of more pixels than this together are decoded one after another."""

Decoded = tuple[Any, tuple[ImageReport, ...], Lap]
"""Pictures, what each has for itself, and the time that took."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """What decodes latents. Of a model without memory limit it holds the autoencoder alone."""

    autoencoder: Autoencoder
    device: torch.device
    limited: Networks | None

    @classmethod
    def of(cls, networks: Networks) -> Decoding:
        return cls(networks.autoencoder, networks.device, networks if networks.residency.is_limited else None)

    def decode(self, request: DrawRequest, latents: Tensor, *, rows: list[int]) -> Decoded:
        """Decode latents (B, C, 2 h, 2 w) of `rows` of the batch as `output_type` says, and put them into canvases."""
        clock = Stopwatch(self.device)
        request.progress("decode", 0, 1)
        pictures, own = finish(request, self._pictures(request, latents), rows)
        request.progress("decode", 1, 1)
        return pictures, own, clock.lap()

    def _pictures(self, request: DrawRequest, latents: Tensor) -> Any:
        if request.output_type == "latent":
            return latents
        width, height = request.workload.size
        at_once = max(1, _DECODED_PIXELS // (width * height))
        workload = replace(request.workload, batch=len(latents))
        with self.limited.working("decode", workload) if self.limited else nullcontext():
            parts = [self.autoencoder.decode(part) for part in torch.split(latents, at_once)]
        pictures = (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1)
        if request.output_type == "pt":
            return pictures
        if request.output_type == "np":
            array: np.ndarray[Any, Any] = pictures.float().permute(0, 2, 3, 1).cpu().numpy()
            return array
        return to_pil(pictures)

    def later(self, request: DrawRequest, *, rows: list[int]) -> Callable[[Tensor, str], Decoded]:
        """Return `decode` for latents of a call and a type, which keeps neither K/V nor tokens of the call."""
        kept = replace(request, references=None, pictures=(), prompt_embeds=None, callback=None, progress=silent)

        def decoder(latents: Tensor, output_type: str) -> Decoded:
            canvases = [kept.canvases[row] if kept.canvases else None for row in rows]
            check_result_sizes(canvases, size=kept.workload.size, output_type=output_type)
            return self.decode(replace(kept, output_type=output_type), latents, rows=rows)

        return decoder
