"""LoRA files: finding and reading them, their dialects, and checking them against a transformer. Files in, values out.

Names are translated by diffusers' converters, one matrix of the file at a time, so that every tensor that is not used is
known by the name it has in the file. Scales stay beside the tensors instead of being multiplied into them: nothing is
rounded on the way. Only safetensors are read. Knows nothing of strengths and of what is active.

Three things are done that diffusers does not do: an `.alpha` and lora_down / lora_up names are understood in every dialect,
the two halves of `final_layer.adaLN_modulation.1`, which original files hold the other way round, are swapped, and the
`adapter_config.json` beside a file of PEFT is read, since the scale is nowhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from limner.errors import CheckpointError, InvalidRequest
from limner.model.lora import Kronecker, LowRank, Update
from limner.weights.digest import digest_tensors
from limner.weights.folder import read_json

__all__ = ["LoraWeights", "load_lora", "resolve_lora"]

_logger = logging.getLogger("limner")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PEFT_CONFIG = "adapter_config.json"
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_(?:down|up)\.weight|alpha|lokr_w[12](?:_[ab])?"
    r"|dora_scale|lora_magnitude_vector(?:\.weight)?|lora_(?:B|up)\.bias)"
)
_TEXT_ENCODER = re.compile(r"(?:lora_te|lora_qwen|text_encoders?[\d._]|te\d?[._]|cond_stage_model\.|conditioner\.)")
_FUSED = {"attn.to_qkv": ("to_q", "to_k", "to_v"), "attn.to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_SWAPPED = re.compile(r"(?:.+\.)?final_layer\.adaLN_modulation\.1")
_SHOWN = 12
"""Unused tensors that a message names; `LoraWeights.unknown` has them all."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraWeights:
    """What a LoRA adds to which matrices of a transformer, by the names of these.

    `digest` is a SHA-256 of names, tensors and scales, the same for all dialects that say the same; `unknown` has the
    names of tensors that are not used (only if `strict` was False); `source` says where it came from.
    """

    updates: Mapping[str, Update]
    digest: str
    source: str
    unknown: tuple[str, ...] = ()


def load_lora(
    source: str | os.PathLike[str] | Tensors,
    *,
    shapes: Mapping[str, tuple[int, int]],
    weight_name: str | None = None,
    strict: bool = True,
) -> LoraWeights:
    """Reads a LoRA for the matrices `shapes` (name to (N, K), as `limner.model.lora.matrix_shapes` gives them).

    `source` is a file, a folder or hub id (with the file's name in `weight_name` if there are several), or tensors by
    name. Dialects: names of diffusers (`transformer.`), the original ones (`diffusion_model.`), PEFT (`base_model.model.`),
    kohya (`lora_unet_`), and LoKr as far as diffusers converts it. Tensors that are not used are an error; `strict=False`
    logs them and leaves them out. Raises `CheckpointError` and `InvalidRequest`.
    """
    if isinstance(source, Mapping):
        where, tensors, config = "the given tensors", _checked_tensors(source), None
    else:
        file = resolve_lora(source, weight_name=weight_name)
        where, (tensors, config) = str(file), _read(file)
    updates, unknown = _convert(tensors, config, shapes=shapes, where=where)
    if not updates:
        raise CheckpointError(
            f"lora: {where}: none of its {len(tensors)} tensors is for a matrix of this transformer ({_some(unknown)}); it "
            f"is of another model or in a dialect that is not known{_hint(unknown)}"
        )
    if unknown and strict:
        raise CheckpointError(
            f"lora: {where}: {len(unknown)} of its {len(tensors)} tensors are not for this transformer: {_some(unknown)}"
            f"{_hint(unknown)}; give a LoRA of this model, or load it without them (strict=False)"
        )
    if unknown:
        _logger.warning("lora: %s: %d tensors are left out: %s", where, len(unknown), ", ".join(unknown))
    return LoraWeights(updates=updates, digest=_digest(updates), source=where, unknown=unknown)


# finding and reading


def resolve_lora(source: str | os.PathLike[str], *, weight_name: str | None = None) -> Path:
    """The file of a LoRA: a file, the one in a folder, or that of a hub id, which is downloaded once.

    Refuses pickles, by name and by content: reading one runs whatever program is in it.
    """
    try:
        path, text = Path(source), os.fspath(source)
        found = path.exists()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"lora: {source!r} is not a path or hub id ({error})") from error
    if not found:
        _refuse_pickle(path)
        if not _HUB_ID.fullmatch(text) or path.suffix == ".safetensors":
            raise CheckpointError(f"lora: {text} is neither a file, a folder nor a hub id (owner/name); check the path")
        path = _download(text, weight_name)
    elif path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        path = path / _choose(names, weight_name, where=text)
    elif weight_name not in (None, path.name):
        raise CheckpointError(f"lora: {path} is a file, and weight_name={weight_name!r} names another; leave it out")
    if not path.is_file():
        raise CheckpointError(f"lora: {path} is not a file; check the name")
    _refuse_pickle(path)
    return path


def _choose(names: list[str], weight_name: str | None, *, where: str) -> str:
    """The one file of a folder or repository that is meant."""
    found = [name for name in names if name.endswith(".safetensors")]
    if weight_name is not None:
        if weight_name not in names:
            raise CheckpointError(
                f"lora: {where} has no {weight_name!r}; it has {', '.join(found) or 'no safetensors'}"
            )
        return weight_name
    found = [name for name in _USUAL_NAMES if name in found][:1] or found
    if len(found) != 1:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles and not found:
            _refuse_pickle(Path(where) / pickles[0])
        has = f"{len(found)} ({', '.join(found)}); name one with weight_name" if found else "none; check the name"
        raise CheckpointError(f"lora: {where} has to hold one .safetensors file, it has {has}")
    return found[0]


def _download(hub_id: str, weight_name: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    failures = (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError)
    try:
        try:
            names = HfApi().list_repo_files(hub_id)
        except failures:  # without a network: what was downloaded before
            folder = Path(snapshot_download(hub_id, local_files_only=True))
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        name = _choose(names, weight_name, where=hub_id)
        beside = (Path(name).parent / _PEFT_CONFIG).as_posix()
        return Path(snapshot_download(hub_id, allow_patterns=[name, beside])) / name
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"lora: {hub_id} is not in the local cache and could not be downloaded ({reason}); check the name, the "
            "network and your hub login, or give a file"
        ) from error


def _refuse_pickle(path: Path) -> None:
    start = b""
    if path.is_file():
        try:
            with path.open("rb") as file:
                start = file.read(4)
        except OSError as error:
            raise CheckpointError(f"lora: {path} cannot be read ({error.strerror})") from error
    # torch.save writes a zip, or, as pickle does, a byte 0x80 and its protocol
    if path.suffix in _PICKLES or start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        raise CheckpointError(
            f"lora: {path} is a pickle and is never opened: reading one runs any program in it; use the .safetensors file"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, and what its header or the file of PEFT beside it says of ranks and alphas."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # copies, since files of LoRAs are written over by the next training
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"lora: {path}: cannot be read ({error}); it is no safetensors file, or truncated or damaged: download it again"
        ) from error
    beside = path.with_name(_PEFT_CONFIG)
    if text := header.get("lora_adapter_metadata"):  # written by diffusers
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"lora: {path}: lora_adapter_metadata in its header is not JSON ({error})") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"lora: {path}: lora_adapter_metadata in its header is not a JSON object")
        return tensors, {k.removeprefix("transformer."): v for k, v in config.items() if k.startswith("transformer.")}
    if any(name.startswith("base_model.model.") for name in tensors) and beside.is_file():
        return tensors, read_json(beside)
    return tensors, None


def _checked_tensors(source: Tensors) -> dict[str, Tensor]:
    for name, value in source.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InvalidRequest("lora", f"{name!r}: {type(value).__name__}: a mapping has to be of names to tensors")
    return {name: value.detach().clone() for name, value in source.items()}


# dialects


def _convert(
    tensors: Tensors, config: Mapping[str, Any] | None, *, shapes: Mapping[str, tuple[int, int]], where: str
) -> tuple[dict[str, Update], tuple[str, ...]]:
    """The updates by name of their matrix, and the names of tensors that are for none."""
    groups: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match and not re.search(r"\d{3}", match["module"]):  # converters count up to the block's number
            groups.setdefault(match["module"], {})[match["part"]] = key
        else:
            unknown.append(key)
    scale_of = _scales(config or {}, where=where)
    updates: dict[str, Update] = {}
    origins: dict[str, str] = {}
    for module, keys in groups.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        named = _known_names(module, parts, shapes)
        if not named:
            unknown += keys.values()
            continue
        for part in parts:
            if problem := _refused(part):
                raise CheckpointError(f"lora: {where}: {keys[part]}: {problem}")
        _check_values(parts, keys, where=where)
        for target, update in _updates(module, parts, named, scale_of, where=where).items():
            first = next(iter(keys.values()))
            if update.shape != shapes[target]:
                found = ", ".join(f"{key} is {list(tensors[key].shape)}" for key in keys.values() if tensors[key].dim())
                raise CheckpointError(
                    f"lora: {where}: {found}; that makes {list(update.shape)} for {target}, which is "
                    f"{list(shapes[target])} here: it is of another model"
                )
            if target in updates:
                raise CheckpointError(f"lora: {where}: {first} and {origins[target]} are both for {target}; keep one")
            updates[target], origins[target] = update, first
    return dict(sorted(updates.items())), tuple(sorted(unknown))


def _refused(part: str) -> str | None:
    """Why a part of an update that is otherwise known cannot be left out."""
    if part == "dora_scale" or part.startswith("lora_magnitude_vector"):
        return "is of a DoRA, which rescales the weights too; that is not supported, and the rest alone would be wrong"
    if part.endswith(".bias"):
        return "is a bias, and no matrix of this transformer has one; train without lora_bias"
    return None


def _known_names(module: str, parts: Tensors, shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Tensor]]:
    """The tensors of one matrix of the file by the names of the transformer's matrices; empty if there are none.

    A LoRA of a fused matrix becomes several; a LoKr of one keeps the fused name.
    """
    usable = {part: value for part, value in parts.items() if not _refused(part)}
    lokr = any(part.startswith("lokr_") for part in usable)
    if lokr:  # the converters multiply alpha into a factor: in float32, not in that of the file
        given = {f"{module}.{part}": value.float() for part, value in usable.items()}
    else:
        down, up = _pair(usable)
        if down is None or up is None or down.dim() != 2 or up.dim() != 2:
            down = up = torch.zeros(3, 3)  # only names are asked here; what is wrong with the tensors is said later
        names = ("lora_down", "lora_up") if module.startswith("lora_unet_") else ("lora_A", "lora_B")
        given = {f"{module}.{name}.weight": _plain(value) for name, value in zip(names, (down, up), strict=True)}
        if names[0] == "lora_down":  # an alpha that makes the scale 1: ours stays beside the tensors
            given[f"{module}.alpha"] = torch.tensor(float(down.shape[0]))
    named = _by_diffusers(given)
    targets = {_split(name)[0] for name in named}
    if not targets or not all(t in shapes or _fused_parts(t) for t in targets):
        # the converters know names of diffusers only behind `transformer.`, or in blocks
        bare = re.sub(r"^(?:diffusion_model|base_model\.model|transformer)\.", "", module)
        named = {f"transformer.{bare}.{key[len(module) + 1 :]}": value for key, value in given.items()}
        if bare not in shapes or (lokr and "alpha" in parts):
            return {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in named.items():
        target, part = _split(name)
        found.setdefault(target, {})[part] = value
    return found


def _by_diffusers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' converters make of the tensors of one matrix; empty if they know no such matrix."""
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    try:
        with _quiet():
            converted = Flux2LoraLoaderMixin.lora_state_dict(dict(given))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AssertionError):  # they raise what comes up
        return {}
    usable = all(name.startswith("transformer.") and _split(name)[1] != "alpha" for name in converted)
    return converted if usable else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the converters would log of names they do not know is in our own messages."""
    logger = logging.getLogger("diffusers.loaders.lora_conversion_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _split(name: str) -> tuple[str, str]:
    """`transformer.x_embedder.lora_A.weight` to `x_embedder` and `lora_A.weight`."""
    match = re.fullmatch(r"(?:transformer\.)?(.+?)\.((?:lora_|lokr_).+|alpha)", name)
    return (match[1], match[2]) if match else (name, "")


def _fused_parts(target: str) -> tuple[str, ...]:
    """The matrices that a fused one of the original layout stands for, in the order of its rows."""
    for suffix, names in _FUSED.items():
        if target.endswith(suffix):
            return tuple(target.removesuffix(suffix.split(".")[1]) + name for name in names)
    return ()


def _pair(parts: Tensors) -> tuple[Tensor | None, Tensor | None]:
    down = parts.get("lora_A.weight", parts.get("lora_down.weight"))
    return down, parts.get("lora_B.weight", parts.get("lora_up.weight"))


def _plain(value: Tensor) -> Tensor:
    """Formats of 8 bits widened, since few operations take them."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize == 1 else value


def _updates(
    module: str,
    parts: Tensors,
    named: Mapping[str, Tensors],
    scale_of: Callable[[str, int | None], float | None],
    *,
    where: str,
) -> dict[str, Update]:
    """The updates of one matrix of the file, by the name of theirs."""
    made: dict[str, Update] = {}
    for target, own in named.items():
        if any(part.startswith("lokr_") for part in own):
            left, right = (_factor(own, f"lokr_w{i}", module=module, where=where) for i in (1, 2))
            known = scale_of(target, None)
            scale = 1.0 if known is None else known
            whole = Kronecker(left=left, right=right, scale=scale, num_rows=left.shape[0] * right.shape[0])
            names = _fused_parts(target) or (target,)
            rows = whole.num_rows // len(names)
            if rows * len(names) != whole.num_rows:
                raise CheckpointError(f"lora: {where}: {module}: {whole.num_rows} rows are not those of q, k and v")
            for i, name in enumerate(names):
                made[name] = replace(whole, first_row=i * rows, num_rows=rows)
        else:
            down, up = own["lora_A.weight"], own["lora_B.weight"]
            rank = _pair(parts)[0]
            assert rank is not None
            alpha = parts.get("alpha")
            known = scale_of(target, rank.shape[0]) if alpha is None else alpha.item() / rank.shape[0]
            made[target] = LowRank(down=down, up=up, scale=1.0 if known is None else known)
    if _SWAPPED.fullmatch(module):
        for target, update in made.items():
            half = update.shape[0] // 2
            if isinstance(update, LowRank):
                made[target] = replace(update, up=update.up.roll(-half, 0))
            else:
                made[target] = replace(update, first_row=half)
    return made


def _factor(parts: Tensors, name: str, *, module: str, where: str) -> Tensor:
    """One side of a Kronecker product: a matrix, or a product of two."""
    if name in parts:
        return parts[name]
    try:
        return parts[f"{name}_a"] @ parts[f"{name}_b"]
    except (KeyError, RuntimeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"lora: {where}: {module}.{name}: {reason}; the file is damaged") from error


def _check_values(parts: Tensors, keys: Mapping[str, str], *, where: str) -> None:
    """Shapes, kinds and values of the tensors of one matrix."""
    for part, value in parts.items():
        if part == "alpha":
            right = value.numel() == 1
        else:
            right = value.dim() == 2 and value.is_floating_point() and 0 not in value.shape
        if not right:
            wanted = "one number" if part == "alpha" else "a matrix of floating point numbers"
            raise CheckpointError(
                f"lora: {where}: {keys[part]} is {value.dtype} {list(value.shape)}; it has to be {wanted}"
            )
        if not torch.isfinite(_plain(value)).all():
            raise CheckpointError(f"lora: {where}: {keys[part]} holds values that are not finite; the file is damaged")
    if any(part.startswith("lokr_") for part in parts):
        return
    down, up = _pair(parts)
    if down is None or up is None:
        there, missing = next(iter(keys.values())), "down (lora_A)" if down is None else "up (lora_B)"
        raise CheckpointError(f"lora: {where}: {there} has no {missing} beside it; the file is incomplete")
    if down.shape[0] != up.shape[1]:
        found = " and ".join(f"{key} {list(parts[part].shape)}" for part, key in keys.items() if part != "alpha")
        raise CheckpointError(f"lora: {where}: {found} are of different ranks; the file is damaged")


# scales


def _scales(config: Mapping[str, Any], *, where: str) -> Callable[[str, int | None], float | None]:
    """From the configuration of an adapter of PEFT, the scale of a matrix of a rank; None where it says nothing.

    alpha / rank, or alpha / sqrt(rank) with `use_rslora`; patterns of names have alphas and ranks of their own.
    """
    alpha_name = "lora_alpha" if "lora_alpha" in config else "alpha"
    if config.get("use_dora"):
        raise CheckpointError(f"lora: {where}: is a DoRA (use_dora), which is not supported; use a plain LoRA")

    def number(value: object, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"lora: {where}: {name}={value!r} in its configuration has to be a number")
        return float(value)

    def look_up(name: str, patterns: object, otherwise: object) -> object:
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            try:
                if not re.fullmatch(r"[\w.^*$]*", str(pattern)):  # no more than that: some patterns take for ever
                    raise re.error("it may hold letters, digits, _ . ^ * $")
                if re.match(rf"(.*\.)?({pattern})$", name):  # as PEFT reads them
                    return value
            except re.error as error:
                raise CheckpointError(
                    f"lora: {where}: pattern {pattern!r} in its configuration is not supported ({error})"
                ) from error
        return otherwise

    def scale(target: str, rank: int | None) -> float | None:
        alpha = look_up(target, config.get("alpha_pattern"), config.get(alpha_name))
        ranks = look_up(target, config.get("rank_pattern"), config.get("r", rank))
        if alpha is None or ranks is None:
            return None
        of = number(ranks, "r")
        if of == 0:
            raise CheckpointError(f"lora: {where}: r={ranks!r} in its configuration has to be at least 1")
        return number(alpha, alpha_name) / (math.sqrt(of) if config.get("use_rslora") else of)

    return scale


def _digest(updates: Mapping[str, Update]) -> str:
    tensors = {f"{name}.{part}": value for name, update in updates.items() for part, value in update.tensors.items()}
    scales = [
        [name, type(u).__name__, repr(u.scale), *((u.first_row, u.num_rows) if isinstance(u, Kronecker) else ())]
        for name, u in updates.items()
    ]
    return hashlib.sha256(f"{json.dumps(scales)}\0{digest_tensors(tensors.items())}".encode()).hexdigest()


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _hint(unknown: tuple[str, ...]) -> str:
    if any(_TEXT_ENCODER.match(name) for name in unknown):
        return "; LoRAs of klein are for the transformer, those for a text encoder are not supported"
    return ""
