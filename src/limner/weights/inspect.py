"""Report on a file or folder of weights: layout, geometry, dtypes, bytes, digests, and what is missing.

Headers suffice for all but the digests. `verify` loads every tensor, looks for NaN and infinity everywhere, and computes
the digest of the loaded network, which does not depend on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.config import TransformerConfig
from limner.errors import CheckpointError
from limner.model.text_encoder import default_out_layers
from limner.weights.checkpoint import Checkpoint
from limner.weights.digest import digest_tensors
from limner.weights.files import read_json
from limner.weights.folder import PARTS as FOLDERS
from limner.weights.folder import FoundKind, bundled_model, find_kind, kind_of_transformer
from limner.weights.geometry import geometry_name
from limner.weights.layouts import PARTS
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer, text_layers
from limner.weights.parts import Progress, check_variant, is_model_folder, open_part, part_of

__all__ = ["ModelReport", "PartReport", "inspect"]

_TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_VAE = ("latent_channels", "block_out_channels", "decoder_block_out_channels", "layers_per_block")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartReport:
    """The report on one part.

    `dtypes` are those of the file, with number of tensors and bytes; `loads_as` is the dtype that they get (None: their
    own). `sha256` is of each file, None without digests; `weights` is the digest of the loaded network, if verified.
    """

    path: str
    part: str
    layout: str
    prefix: str
    geometry: Mapping[str, Any]
    dtypes: Mapping[str, Mapping[str, int]]
    num_tensors: int
    nbytes: int
    loads_as: str | None
    sha256: Mapping[str, str] | None
    weights: str | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]
    not_finite: tuple[str, ...] | None
    notes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """True if nothing was found that prevents loading."""
        return not (self.missing or self.unexpected or self.wrong or self.not_finite)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        name = self.geometry.get("name")
        shown = ", ".join(f"{key} {value}" for key, value in self.geometry.items() if key != "name")
        prefix = f" under {self.prefix!r}" if self.prefix and self.part == "transformer" else ""
        found = [
            f"{self.part}: {self.layout}{prefix}, {f'{name}: ' if name else ''}{shown}",
            f"  {self.num_tensors} tensors, {self.nbytes} bytes: "
            + ", ".join(f"{kind} {value['tensors']} ({value['nbytes']} bytes)" for kind, value in self.dtypes.items()),
        ]
        found += [f"  sha256 {digest}  {file}" for file, digest in (self.sha256 or {}).items()]
        found += [f"  weights {self.weights} as {self.loads_as or 'stored'}"] if self.weights else []
        for what, values in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong", self.wrong),
            ("not finite", self.not_finite or ()),
        ):
            found += [f"  {what}: {value}" for value in values]
        return [*found, *(f"  {note}" for note in self.notes)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """The report on a file, a part's folder, or a model with its parts; `missing` are folders that a model lacks.

    `kind` is what the model was trained for (`limner.kinds`) and the file that says so; None where nothing does.
    """

    path: str
    kind: Mapping[str, Any] | None
    parts: tuple[PartReport, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return not self.missing and not self.problems and all(part.whole for part in self.parts)

    def lines(self) -> list[str]:
        found = [line for part in self.parts for line in part.lines()]
        if self.kind is not None:
            how = "distilled" if self.kind["is_distilled"] else "base, drawn with guidance"
            found.insert(0, f"kind: {self.kind['references']} references, {how} ({self.kind['source']})")
        found += [f"missing: {name}" for name in self.missing] + [f"damaged: {problem}" for problem in self.problems]
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "parts": [{**asdict(part), "whole": part.whole} for part in self.parts],
            "whole": self.whole,
        }


def inspect(
    source: Path,
    *,
    like: Path | None = None,
    part: str | None = None,
    digests: bool = True,
    verify: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """Report on a file, a part's folder or a model's folder; `like` is a model folder that says what a file does not,
    `variant` which weights of folders are read.

    Raises `CheckpointError` with the reason for anything but a checkpoint of this family.
    """
    report = progress or (lambda part, done, of: None)
    is_model = is_model_folder(source)
    if not is_model or part is not None:
        name = part_of(source, part=part) or PARTS[0]
        inside = source / name if is_model else source
        check_variant(variant, {name: inside})
        checkpoint = open_part(name, inside, like=like / name / "config.json" if like else None, variant=variant)
        return ModelReport(
            path=str(source),
            kind=_kind(kind_of_transformer(inside)) if name == "transformer" else None,
            parts=(_inspect(checkpoint, digests, verify, report),),
            missing=(),
            problems=(),
        )
    read_json(source / "model_index.json")
    check_variant(variant, {name: source / name for name in PARTS})
    missing = tuple(name for name in FOLDERS if not (source / name).is_dir())
    parts, problems = [], []
    for name in PARTS:
        if name not in missing:
            try:
                parts.append(_inspect(open_part(name, source / name, variant=variant), digests, verify, report))
            except CheckpointError as error:
                problems.append(str(error))
    kind = _kind(find_kind(source))
    return ModelReport(path=str(source), kind=kind, parts=tuple(parts), missing=missing, problems=tuple(problems))


def _kind(found: FoundKind | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"references": found.kind.references, "is_distilled": found.kind.distilled, "source": found.source}


def _inspect(checkpoint: Checkpoint, digests: bool, verify: bool, progress: Progress) -> PartReport:
    layout, config = checkpoint.layout, checkpoint.config
    used = depth = None
    prefix = "network."  # where our wrappers hold the networks of diffusers and transformers
    if layout.part == "transformer":
        geometry = TransformerConfig.from_diffusers(config, where=str(checkpoint.where))
        bundled = TransformerConfig.from_diffusers(read_json(bundled_model() / "transformer" / "config.json"))
        network = empty_transformer(geometry, int8=layout.quantization == "int8", where=checkpoint.where)
        shown: dict[str, Any] = {"name": geometry_name(geometry, bundled), **_sizes(geometry)}
        prefix = ""
    elif layout.part == "vae":
        network = empty_autoencoder(config, where=checkpoint.where)
        shown = {name: network.config[name] for name in _VAE if network.config.get(name) is not None}
    else:
        depth, layers = text_layers(config, None, where=checkpoint.where)
        used = max(layers)
        int8 = layout.quantization == "int8"
        network = empty_text_network(config, used=used, depth=depth, where=checkpoint.where, int8=int8)
        shown = {name: config[name] for name in _TEXT if name in config} | {
            "layers_read": list(default_out_layers(depth))
        }
    expected = network.state_dict()
    problems = checkpoint.problems(expected, used=used, depth=depth)
    weights, not_finite = None, None
    if verify and not len(problems):
        bad: list[str] = []
        weights = digest_tensors(
            (prefix + name, tensor) for name, tensor in _watched(checkpoint, expected, bad, progress)
        )
        not_finite = tuple(bad)
    sha256 = {str(file): _sha256(file) for file in checkpoint.file.files} if digests else None
    wide = checkpoint.natural_dtype
    return PartReport(
        path=str(checkpoint.where),
        part=layout.part,
        layout=layout.kind,
        prefix=layout.prefix,
        geometry=shown,
        dtypes=_dtypes(checkpoint),
        num_tensors=len(layout.tensors) + len(layout.scales) + len(layout.unused),
        nbytes=sum(value["nbytes"] for value in _dtypes(checkpoint).values()),
        loads_as=None if wide is None else str(wide).removeprefix("torch."),
        sha256=sha256,
        weights=weights,
        missing=problems.missing,
        unexpected=problems.unexpected,
        wrong=problems.shapes,
        not_finite=not_finite,
        notes=_notes(checkpoint),
    )


def _watched(
    checkpoint: Checkpoint, expected: Mapping[str, Tensor], bad: list[str], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    for done, (name, tensor) in enumerate(checkpoint.stream(expected, check=False)):
        progress(checkpoint.layout.part, done, len(expected))
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad.append(name)
        yield name, tensor


def _sizes(config: TransformerConfig) -> dict[str, Any]:
    return {
        "double_blocks": config.num_double_blocks,
        "single_blocks": config.num_single_blocks,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "text_width": config.text_width,
        "in_channels": config.in_channels,
    }


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    layout = checkpoint.layout
    found: dict[str, dict[str, int]] = {}
    names = [*layout.tensors, *layout.scales, *layout.unused]
    for name in names:
        info = checkpoint.file.infos.get(layout.prefix + name) or checkpoint.file.infos[name]
        count = found.setdefault(info.dtype, {"tensors": 0, "nbytes": 0})
        count["tensors"] += 1
        count["nbytes"] += info.nbytes
    return found


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    layout, notes = checkpoint.layout, []
    if layout.quantization not in (None, "int8"):
        notes.append("widened to bfloat16 when it is loaded, unless another dtype or int8 is asked for")
    inputs = [name for name in layout.unused if name.endswith(("input_scale", "scale_input"))]
    if inputs:
        notes.append(f"{len(inputs)} input_scale are not used: activations stay wide")
    return tuple(notes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
