"""The names under which the loaded model answers."""

from __future__ import annotations

__all__ = ["ENDPOINTS", "model_names"]

ENDPOINTS = ("flux-2-klein-9b-preview", "flux-2-klein-9b", "flux-2-klein-4b")
"""Names of the hosted service; the loaded model answers under all of them."""


def model_names(own: str) -> list[str]:
    """Return the model's own name and the names of the hosted service."""
    return [own, *ENDPOINTS]
