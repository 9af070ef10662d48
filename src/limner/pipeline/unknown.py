"""Arguments that a function does not have: an error that suggests the right one. Knows no function."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from limner.errors import InvalidRequest

__all__ = ["UnknownArgument", "check_names", "named_arguments"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MEANT = {
    "images": "image",
    "input_image": "image",
    "init_image": "image",
    "reference_images": "image",
    "prompts": "prompt",
    "text": "prompt",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "n": "num_images_per_prompt",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "seeds": "seed",
    "size": "width",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end",
    "timesteps": "sigmas",
    "quantization_config": "quantize",
    "cpu_offload": "memory_limit",
    "max_memory": "memory_limit",
    "cache_dtype": "kv_cache_dtype",
    "model_id": "model",
}
"""Names of other libraries, and ours. One is suggested where a function has it."""


class UnknownArgument(InvalidRequest, TypeError):
    """A function has no such argument. A `TypeError` too, as Python raises."""


def check_names(names: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raise `UnknownArgument` for the first name that is not known, with the one that may have been meant."""
    allowed = list(known)
    for name in names:
        if name in allowed:
            continue
        meant = _MEANT.get(name)
        close = [meant] if meant in allowed else difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
        remedy = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"
        raise UnknownArgument(name, f"is not an argument of {where}; {remedy}")


def named_arguments(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function or method so that an unknown name raises `UnknownArgument`."""
    parameters = inspect.signature(call).parameters.values()
    known = [p.name for p in parameters if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]

    @functools.wraps(call)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        check_names(kwargs, known, where=call.__name__.replace("__call__", "a call"))
        return call(*args, **kwargs)

    return checked
