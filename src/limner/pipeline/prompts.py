"""Prompts to text tokens, and a cache of them. Knows the text encoder, and no pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limner.errors import InvalidRequest
from limner.grid import PIXELS
from limner.memory import Workload
from limner.pipeline.arguments import DrawRequest
from limner.pipeline.networks import Networks
from limner.pipeline.recent import Recent
from limner.weights.digest import Fingerprint, fingerprint

__all__ = ["PromptEncoder", "PromptReport"]

_logger = logging.getLogger("limner")
_CACHE_SIZE = 16
_Key = tuple[str, int, tuple[int, ...] | None, Fingerprint]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptReport:
    """How a prompt was read: its tokens (chat template included), the limit, and the text that was cut off, or ""."""

    num_tokens: int
    limit: int
    cut: str


class PromptEncoder:
    """Encodes prompts one at a time, so that the tokens of a prompt do not depend on its neighbours in a batch.

    Keeps the tokens of the last 16 prompts; an entry is no longer found when the text encoder's weights change.
    """

    def __init__(self) -> None:
        self._cache: Recent[_Key, tuple[Tensor, PromptReport]] = Recent(_CACHE_SIZE)

    def clear(self) -> None:
        """Forget all tokens, as when the text encoder moves."""
        self._cache.clear()

    def encode(self, request: DrawRequest, networks: Networks) -> tuple[Tensor, tuple[PromptReport, ...]]:
        """Return text tokens (B, S_txt, text_width), and a report of each prompt; what is cut off is logged.

        Raises `InvalidRequest` unless tokens of the chosen layers are as wide as the transformer reads them.
        """
        tokens = request.prompt_embeds
        reports: tuple[PromptReport, ...] = ()
        if request.prompts is not None:
            request.progress("text", 0, 1)
            tokens, reports = self._encode_all(request.prompts, request, networks)
        assert tokens is not None
        return tokens.to(networks.device).repeat_interleave(request.num_images_per_prompt, dim=0), reports

    def encode_negative(self, request: DrawRequest, networks: Networks) -> Tensor | None:
        """Return the text tokens (B, S, text_width) of negative prompts; None without guidance. Raises as `encode`."""
        guidance = request.guidance
        if guidance is None:
            return None
        tokens = guidance.prompt_embeds
        if guidance.prompts is not None:
            tokens, _ = self._encode_all(guidance.prompts, request, networks)
        assert tokens is not None
        return tokens.to(networks.device).repeat_interleave(request.num_images_per_prompt, dim=0)

    def _encode_all(
        self, prompts: Sequence[str], request: DrawRequest, networks: Networks
    ) -> tuple[Tensor, tuple[PromptReport, ...]]:
        encoder = fingerprint(networks.text_encoder, after=networks.digests.after)
        limit, layers = request.max_sequence_length, request.text_encoder_out_layers
        found = [self._encode((prompt, limit, layers, encoder), networks) for prompt in prompts]
        for _, report in found:
            if report.num_tokens > limit:
                _logger.warning("prompt: %d tokens, %d are read; cut: %r", report.num_tokens, limit, report.cut)
        width, expected = found[0][0].shape[-1], networks.transformer.config.text_width
        if width != expected:
            raise InvalidRequest(
                "text_encoder_out_layers", f"gives tokens of width {width}, the transformer reads {expected}"
            )
        return torch.cat([tokens for tokens, _ in found]), tuple(report for _, report in found)

    def _encode(self, key: _Key, networks: Networks) -> tuple[Tensor, PromptReport]:
        """Return the tokens (1, S_txt, text_width) of one prompt, from the cache or computed."""
        prompt, limit, layers, _ = key
        found = self._cache.find(key)
        if found is None:
            tokenized = networks.text_encoder.tokenize(prompt, max_sequence_length=limit)
            report = PromptReport(num_tokens=tokenized.num_tokens, limit=limit, cut=tokenized.cut)
            with networks.working("encode text", Workload(size=(PIXELS, PIXELS), num_text=limit)):
                found = self._cache.keep(key, (networks.text_encoder([tokenized], out_layers=layers), report))
        return found
