"""Admission by memory: what a call needs, and refusing what does not fit. Knows sizes, and neither prompts nor pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from limner.config import AutoencoderConfig
from limner.errors import CapacityError
from limner.grid import PIXELS
from limner.images.reference import ASK_MAX_PIXELS
from limner.memory import Workload, call_bytes, cheapest, control_bytes, kv_bytes
from limner.memory.free import free_bytes
from limner.pipeline.networks import Networks

__all__ = ["Admission", "check_workload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The memory that calls of some networks need. `reference_pixels` is the largest size of one processed reference."""

    networks: Networks
    reference_pixels: int

    def memory_needed(self, *, num_ref: int, num_own: int, batch: int) -> int:
        """Return the peak bytes of a call on top of the weights. Counts are of tokens of 16x16 pixels.

        `num_ref` counts references to prefill: K/V that are cached are in memory already; those of a joint model are
        counted always. `num_own` are the text and output tokens of one image.
        """
        networks = self.networks
        config = networks.transformer.config
        joint, size = networks.kind.joint, networks.dtype.itemsize
        whole = kv_bytes(config, num_ref, itemsize=size, kv=networks.kv_cache_dtype, joint=joint)
        in_other_processes = whole - networks.kv_bytes(num_ref)
        return (
            call_bytes(
                config,
                AutoencoderConfig.from_diffusers(dict(networks.autoencoder.network.config)),
                num_ref=num_ref,
                num_own=num_own,
                batch=batch,
                formats=networks.formats,
                whole_pixels=networks.autoencoder.whole_pixels,
                reference_pixels=min(num_ref * PIXELS**2, self.reference_pixels),
                joint=joint,
            )
            - in_other_processes
        )

    def memory_for(self, workload: Workload, *, together: bool = False) -> int:
        """Return the peak bytes of a call on top of the weights, with canvases, guidance and K/V that are used again.

        `together`: both prompts of guidance run as one batch.
        """
        networks, batch = self.networks, workload.batch * (2 if together else 1)
        needed = self.memory_needed(num_ref=workload.num_ref, num_own=workload.num_own, batch=batch)
        return needed + control_bytes(
            networks.transformer.config,
            AutoencoderConfig.from_diffusers(dict(networks.autoencoder.network.config)),
            workload,
            formats=networks.formats,
            needed=needed,
            num_parts=networks.ranks.shard[1] if networks.ranks.shard else 1,
        )

    def check_free(self, workload: Workload) -> None:
        """Raise `CapacityError` if a call does not fit in free memory now, its references computed too."""
        check_workload(self.memory_for(workload), self.networks.residency.free_bytes(self.networks.device), workload)

    def check_call(self, workload: Workload) -> None:
        """Raise `CapacityError` if a call does not fit. K/V of isolated references may be in memory already: where they are
        computed, `check_free` counts them, with the rest of the call.
        """
        self.check_free(workload if workload.joint else replace(workload, references=()))
        self.check_limit(workload)

    def is_free(self, workload: Workload) -> bool:
        """Whether a call fits in free memory now with both prompts of guidance as one batch, its references computed too.

        False where memory is limited.
        """
        networks = self.networks
        fits = self.memory_for(workload, together=True) <= free_bytes(networks.device)
        return fits and not networks.residency.is_limited

    def check_limit(self, workload: Workload) -> None:
        """Raise `CapacityError` if a call exceeds the memory limit however its weights are staged."""
        networks = self.networks
        limit = networks.residency.limit
        cheapest(
            networks.geometry, workload, formats=networks.formats, limit=limit, device=networks.device.type, fixed=True
        )


def check_workload(needed: int, free: int, workload: Workload) -> None:
    """Raise `CapacityError` with the numbers if the `needed` bytes of a call are more than `free`."""
    if needed <= free:
        return
    num_ref, own = workload.num_ref, f"{workload.batch} x {workload.num_own} own tokens"
    what, remedy = f"size: {own} need", "a smaller output or fewer images at once"
    remedy = f"a smaller canvas, {remedy}" if workload.canvas_pixels else remedy
    if num_ref:
        what = f"references: {num_ref} reference tokens and {own} need"
        remedy = f"fewer or smaller references ({ASK_MAX_PIXELS}), {remedy}"
    raise CapacityError(f"{what} {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; use {remedy}")
