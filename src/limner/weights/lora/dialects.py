"""The dialects of LoRA files: which tensors belong together, and which matrices of the transformer they are for.

Names are translated by diffusers' converters, one matrix of the file at a time, so that every unused tensor is known by
its name in the file. Two things go beyond diffusers: an `.alpha` and lora_down / lora_up names are understood in every
dialect, and the halves of `final_layer.adaLN_modulation.1`, which original files have in the other order, are known.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["Tensors", "fused_parts", "group", "halves_swapped", "is_lokr", "known_names", "pair", "refusal", "widened"]

Tensors = Mapping[str, Tensor]

_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_(?:down|up)\.weight|alpha|lokr_w[12](?:_[ab])?"
    r"|dora_scale|lora_magnitude_vector(?:\.weight)?|lora_(?:B|up)\.bias)"
)
_FUSED = {"attn.to_qkv": ("to_q", "to_k", "to_v"), "attn.to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_SWAPPED = re.compile(r"(?:.+\.)?final_layer\.adaLN_modulation\.1")


def group(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the keys of a file by module and part of its update ("lora_A.weight"), and those of no update."""
    groups: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        match = _KEY.fullmatch(key)
        if match and not re.search(r"\d{3}", match["module"]):  # converters count up to the block's number
            groups.setdefault(match["module"], {})[match["part"]] = key
        else:
            others.append(key)
    return groups, others


def refusal(part: str) -> str | None:
    """Return why a part of a known update is refused instead of left out; None if it is used."""
    if part == "dora_scale" or part.startswith("lora_magnitude_vector"):
        return "is of a DoRA, which rescales the weights too; that is not supported, and the rest alone would be wrong"
    if part.endswith(".bias"):
        return "is a bias, and no matrix of this transformer has one; train without lora_bias"
    return None


def known_names(module: str, parts: Tensors, shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of one matrix of the file by the names of the transformer's matrices; {} if there are none.

    A LoRA of a fused matrix becomes several; a LoKr of one keeps the fused name.
    """
    usable = {part: value for part, value in parts.items() if not refusal(part)}
    lokr = is_lokr(usable)
    if lokr:  # the converters multiply alpha into a factor, so in float32
        given = {f"{module}.{part}": value.float() for part, value in usable.items()}
    else:
        down, up = pair(usable)
        if down is None or up is None or down.dim() != 2 or up.dim() != 2:
            down = up = torch.zeros(3, 3)  # only names matter here; `check_values` refuses bad tensors later
        names = ("lora_down", "lora_up") if module.startswith("lora_unet_") else ("lora_A", "lora_B")
        given = {f"{module}.{name}.weight": widened(value) for name, value in zip(names, (down, up), strict=True)}
        if names[0] == "lora_down":  # an alpha that makes the scale 1; ours stays apart from the tensors
            given[f"{module}.alpha"] = torch.tensor(float(down.shape[0]))
    named = _by_diffusers(given)
    targets = {_split(name)[0] for name in named}
    if not targets or not all(t in shapes or fused_parts(t) for t in targets):
        # the converters know names of diffusers only after `transformer.`, or in blocks
        bare = re.sub(r"^(?:diffusion_model|base_model\.model|transformer)\.", "", module)
        named = {f"transformer.{bare}.{key[len(module) + 1 :]}": value for key, value in given.items()}
        if bare not in shapes or (lokr and "alpha" in parts):
            return {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in named.items():
        target, part = _split(name)
        found.setdefault(target, {})[part] = value
    return found


def pair(parts: Tensors) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensors (down, up) of a LoRA, under either of their names."""
    down = parts.get("lora_A.weight", parts.get("lora_down.weight"))
    return down, parts.get("lora_B.weight", parts.get("lora_up.weight"))


def is_lokr(parts: Iterable[str]) -> bool:
    """Return True for the parts of a LoKr: a Kronecker product instead of a product."""
    return any(part.startswith("lokr_") for part in parts)


def fused_parts(target: str) -> tuple[str, ...]:
    """Return the matrices that a fused one of the original layout stands for, in the order of its rows."""
    for suffix, names in _FUSED.items():
        if target.endswith(suffix):
            return tuple(target.removesuffix(suffix.split(".")[1]) + name for name in names)
    return ()


def halves_swapped(module: str) -> bool:
    """Return True if the file has the halves of the matrix's rows in the other order."""
    return _SWAPPED.fullmatch(module) is not None


def widened(value: Tensor) -> Tensor:
    """Return 8 bit formats in float32, since few operations take them."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value


def _by_diffusers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what diffusers' converters make of the tensors of one matrix; {} if they know no such matrix."""
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    try:
        with _quiet():
            converted = Flux2LoraLoaderMixin.lora_state_dict(dict(given))
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        RuntimeError,
        AssertionError,
    ):  # the types that the converters raise
        return {}
    usable = all(name.startswith("transformer.") and _split(name)[1] != "alpha" for name in converted)
    return converted if usable else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converters about unknown names; our own messages list them."""
    logger = logging.getLogger("diffusers.loaders.lora_conversion_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _split(name: str) -> tuple[str, str]:
    """Split `transformer.x_embedder.lora_A.weight` into `x_embedder` and `lora_A.weight`."""
    match = re.fullmatch(r"(?:transformer\.)?(.+?)\.((?:lora_|lokr_).+|alpha)", name)
    return (match[1], match[2]) if match else (name, "")
