"""Pictures to References: preparing them, their key, and their K/V from the store or computed.

Owns what a pipeline does with references before it draws. Does not know prompts, sizes of outputs or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from limner.config import ReferencePolicy
from limner.grid import PIXELS
from limner.images import Picture, PreparedReference, ReferenceReport, prepare_references, to_pixels
from limner.memory import Workload
from limner.model.kv import ReferenceKV, ReferenceTokens
from limner.pipeline.admission import Admission
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.canvas import Canvas
from limner.pipeline.networks import Networks
from limner.pipeline.progress import Stopwatch
from limner.references import References, position_ids, reference_key
from limner.store import ReferenceStore, Source
from limner.tokens import pack

__all__ = ["CacheSource", "Picture", "Prefiller", "with_reports"]

CacheSource = Literal["none", "given"] | Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefiller:
    """References of pictures: prepared by `policy`, computed if they are not in `store`."""

    store: ReferenceStore
    policy: ReferencePolicy
    admission: Admission

    @property
    def networks(self) -> Networks:
        return self.admission.networks

    def prepare(self, image: Picture | Sequence[Picture]) -> tuple[PreparedReference, ...]:
        """Process a picture or an ordered list of them. Raises `InvalidRequest`."""
        return prepare_references(image, policy=self.policy)

    def key_of(self, prepared: Sequence[PreparedReference]) -> str:
        """Return the content key of prepared pictures in this order, whether or not their K/V are cached."""
        return self._key(prepared, weights=self.networks.reference_weights(), arithmetic=self.networks.arithmetic)

    def get(
        self, prepared: Sequence[PreparedReference], *, workload: Workload | None = None
    ) -> tuple[References, Source]:
        """Return the References of prepared pictures, and where they came from.

        `workload` is the call that is going to use them, for admission; None: there is none. Raises `CapacityError`.
        """
        weights, arithmetic = self.networks.reference_weights(), self.networks.arithmetic

        def compute() -> References:
            sizes = tuple(p.report.processed_size for p in prepared)
            self.admission.check_free(workload or Workload(size=(0, 0), num_text=0, references=sizes))
            return self._compute(prepared, weights=weights)

        key = self._key(prepared, weights=weights, arithmetic=arithmetic)
        if self.networks.ranks.alone:
            references, source = self.store.get(key, compute, device=self.networks.device)
        else:
            references, source = self._get_together(key, compute, prepared)
        return with_reports(references, tuple(p.report for p in prepared)), source

    def get_for(self, request: DrawRequest) -> tuple[References | None, CacheSource]:
        """Return the References of a call and where they came from: those given, or of its pictures. Raises as `get`."""
        if not request.pictures:
            return request.references, "given" if request.references else "none"
        request.progress("references", 0, 1)
        found = self.get(request.pictures, workload=request.workload)
        request.progress("references", 1, 1)
        return found

    def canvas_tokens(self, canvases: Sequence[Canvas | None]) -> Tensor | None:
        """Return the tokens (1 or B, S_img, C) of the canvases of images, from the store or encoded.

        None: the steps have no use for them. An image without canvas gets the tokens of another, and a mask that hides
        them.
        """
        used = [None if canvas is None or canvas.is_plain else canvas.prepared for canvas in canvases]
        tokens = {one.report.digest: one for one in used if one is not None}
        found = {digest: self._tokens_of(one) for digest, one in tokens.items()}
        if len(found) < 2:
            return next(iter(found.values()), None)
        any_other = next(iter(found))
        return torch.cat([found[any_other if one is None else one.report.digest] for one in used])

    def token_key(self, prepared: PreparedReference) -> str:
        """Return the key under which the tokens of a canvas are kept."""
        return reference_key(
            weights=self.networks.token_weights(),
            dtype=self.networks.dtype,
            arithmetic=self.networks.arithmetic,
            digests=[prepared.report.digest],
            joint=True,
        )

    def _tokens_of(self, prepared: PreparedReference) -> Tensor:
        """Return the tokens (1, S, C) of a picture, from the store or encoded."""
        networks = self.networks
        weights = networks.token_weights()

        def encode() -> References:
            kv = ReferenceKV(layers=(ReferenceTokens(self._encode((prepared,))),))
            return self._make(kv, (prepared,), weights=weights)

        key = self.token_key(prepared)
        found = self.store.get(key, encode, device=networks.device)[0] if networks.ranks.alone else encode()
        assert found.tokens is not None
        return found.tokens

    def _key(self, prepared: Sequence[PreparedReference], *, weights: str, arithmetic: str) -> str:
        return reference_key(
            weights=weights,
            dtype=self.networks.dtype,
            arithmetic=arithmetic,
            digests=[p.report.digest for p in prepared],
            quantization=None if self.networks.kind.joint else self.networks.kv_cache_dtype,
            shard=self.networks.reference_shard,
            joint=self.networks.kind.joint,
        )

    def _get_together(
        self, key: str, compute: Callable[[], References], prepared: Sequence[PreparedReference]
    ) -> tuple[References, Source]:
        """As `ReferenceStore.get`, in all processes of a model: all compute the entry unless each of them has it."""
        ranks, device = self.networks.ranks, self.networks.device
        ranks.check_same({"image": [p.report.digest for p in prepared]})
        found = self.store.find(key, device=device)
        if all(ranks.all_gather(found is not None)) and found is not None:
            return found
        made = compute()
        if found is None:
            made, _ = self.store.get(key, lambda: made, device=device)
        return made, "miss"

    @torch.no_grad()
    def _encode(self, prepared: Sequence[PreparedReference]) -> Tensor:
        """Return the tokens (1, S_ref, C) of pictures in their order, equal bit for bit in all processes."""
        networks = self.networks
        sizes = tuple(p.report.processed_size for p in prepared)
        with networks.working("encode references", Workload(size=(PIXELS, PIXELS), references=sizes)):
            latents = [networks.autoencoder.encode(to_pixels(p.pixels)) for p in prepared]
        tokens = torch.cat([pack(x) for x in latents], dim=1).to(networks.device, networks.dtype)
        return networks.ranks.broadcast_tensor(tokens)

    @torch.no_grad()
    def _compute(self, prepared: Sequence[PreparedReference], *, weights: str) -> References:
        networks = self.networks
        clock = Stopwatch(networks.device)
        ref_tokens = self._encode(prepared)
        if networks.kind.joint:
            kv = ReferenceKV(layers=(ReferenceTokens(ref_tokens),))
        else:
            sizes = tuple(p.report.processed_size for p in prepared)
            workload = Workload(size=(PIXELS, PIXELS), references=sizes)
            ids = position_ids([p.report for p in prepared])
            with networks.working("prefill", workload, cached=networks.kv_bytes(workload.num_ref)):
                kv = networks.transformer.prefill(ref_tokens, ids, quantization=networks.kv_cache_dtype)
        return self._make(kv, prepared, weights=weights, seconds=clock.lap().seconds)

    def _make(
        self, kv: ReferenceKV, prepared: Sequence[PreparedReference], *, weights: str, seconds: float = 0.0
    ) -> References:
        networks, joint = self.networks, kv.tokens is not None
        return References.make(
            kv,
            weights=weights,
            kernel=networks.arithmetic,
            quantization=None if joint else networks.kv_cache_dtype,
            reports=tuple(p.report for p in prepared),
            dtype=networks.dtype,
            prefill_seconds=seconds,
            shard=None if joint else networks.reference_shard,
        )


def with_reports(references: References, reports: tuple[ReferenceReport, ...]) -> References:
    """Replace the reports: an entry of the store may be of other pictures with the same processed pixels."""
    return references if references.reports == reports else replace(references, reports=reports)
