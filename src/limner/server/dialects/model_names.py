"""The names under which the loaded model answers."""

from __future__ import annotations

from limner.server.http.settings import ServeSettings

__all__ = ["ENDPOINTS", "answers_to", "model_names"]

ENDPOINTS = ("flux-2-klein-9b-preview", "flux-2-klein-9b", "flux-2-klein-4b")
"""Names of the hosted service; the loaded model answers under all of them."""
_BUILT_IN = ("gpt-image-", "dall-e-", "chatgpt-image-")
"""How the names of OpenAI's image models begin. Some clients send no others."""


def model_names(settings: ServeSettings) -> list[str]:
    """Return the names to show: those that an operator gave or the model's own, and those of the hosted service."""
    return list(dict.fromkeys([*(settings.served_names or (settings.model_name,)), *ENDPOINTS]))


def answers_to(name: str, settings: ServeSettings) -> bool:
    """Return whether the model answers under a name: one to show or, unless an operator gave names, one of OpenAI's."""
    return name in model_names(settings) or (not settings.served_names and name.startswith(_BUILT_IN))
