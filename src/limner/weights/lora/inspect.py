"""Report on a LoRA file: its dialects, kinds of updates, ranks, and what would be refused.

Headers suffice; with the configuration of a model the file is loaded for its matrices too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from limner.config import TransformerConfig
from limner.errors import CheckpointError
from limner.model.lora import matrix_shapes
from limner.weights.files import SafetensorsFile, is_pickle, read_json
from limner.weights.lora.dialects import Matrix, all_blocks_as_one, matrices_of_one_block
from limner.weights.lora.kinds import group_keys, is_part, kind_of, refusal
from limner.weights.lora.load import hint, load_lora
from limner.weights.lora.scales import Scales
from limner.weights.lora.source import USUAL_NAMES, lora_config
from limner.weights.networks import empty_transformer

__all__ = ["LoraReport", "inspect_lora"]

_RANKED = ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraReport:
    """The report on a LoRA: matrices by dialect, kind and rank; tensors by dtype; where scales come from.

    `unknown` are tensors for no matrix of the family. `problem` is what loading would say, None if nothing is known to be
    wrong. `digest` is that of `LoraWeights`, known with a model.
    """

    path: str
    dialects: Mapping[str, int]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    dtypes: Mapping[str, int]
    num_tensors: int
    nbytes: int
    scales: str
    unknown: tuple[str, ...]
    problem: str | None
    digest: str | None

    @property
    def whole(self) -> bool:
        """True if nothing was found that prevents loading."""
        return self.problem is None

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        kinds = ", ".join(f"{kind} of {num} matrices" for kind, num in self.kinds.items()) or "no update that is known"
        ranks = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        dtypes = ", ".join(f"{dtype} {num}" for dtype, num in self.dtypes.items())
        found = [f"lora: {kinds}{ranks}, {self.scales}"]
        found += [f"  dialect: {title} ({num} matrices)" for title, num in self.dialects.items()]
        found.append(f"  {self.num_tensors} tensors, {self.nbytes} bytes: {dtypes}")
        found += [f"  unexpected: {name}" for name in self.unknown]
        found += [f"  digest {self.digest}"] if self.digest else []
        return found + ([f"  refused: {self.problem}"] if self.problem else [])

    def as_json(self) -> dict[str, Any]:
        return {"kind": "lora", **asdict(self), "whole": self.whole}


def inspect_lora(source: Path, *, like: Path | None = None) -> LoraReport | None:
    """Report on a LoRA's file, or the folder of one; None if it is none.

    `like` is a model folder for whose transformer the LoRA is checked. Raises `CheckpointError` if it cannot be read.
    """
    path = next((source / name for name in USUAL_NAMES if (source / name).is_file()), source)
    if path.suffix != ".safetensors" or not path.is_file() or is_pickle(path):
        return None
    infos = SafetensorsFile(path).infos
    if 2 * sum(map(is_part, infos)) <= len(infos):
        return None
    problem = digest = None
    kinds: Counter[str] = Counter()
    titles: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    unknown: list[str] = []
    config: dict[str, Any] = {}
    try:
        groups, unknown = group_keys(infos, where=str(path))
        config = lora_config(path, infos) or {}
        Scales(config, where=str(path))
    except CheckpointError as error:
        groups, problem = {}, str(error)
    for module, keys in groups.items():
        matrix = _matrix(module)
        if matrix is None:
            unknown += keys.values()
            continue
        titles[matrix.dialect.title] += 1
        kinds[kind_of(keys) or "an update of parts that do not fit"] += 1
        ranks.update(infos[keys[part]].shape[0] for part in [part for part in _RANKED if part in keys][:1])
        problem = problem or next((f"{key} {why}" for part, key in keys.items() if (why := refusal(part))), None)
    if unknown and problem is None:
        problem = f"{len(unknown)} tensors are for no matrix of this family{hint(tuple(unknown))}"
    if like is not None and problem is None:
        problem, digest = _loaded(path, like, rotates="OFT" in kinds)
    alphas = any(key.endswith(".alpha") for key in infos)
    return LoraReport(
        path=str(path),
        dialects=dict(titles),
        kinds=dict(kinds),
        ranks=dict(sorted(ranks.items())),
        dtypes=dict(Counter(info.dtype for info in infos.values())),
        num_tensors=len(infos),
        nbytes=sum(info.nbytes for info in infos.values()),
        scales="scales from alphas in the file" if alphas else "scales from a configuration" if config else "scale 1",
        unknown=tuple(sorted(unknown)),
        problem=problem,
        digest=digest,
    )


def _matrix(module: str) -> Matrix | None:
    return matrices_of_one_block().find(all_blocks_as_one(module))


def _loaded(path: Path, like: Path, *, rotates: bool) -> tuple[str | None, str | None]:
    """Return what loading it for a model says, and its digest, which of a rotation depends on the weights."""
    config = like / "transformer" / "config.json"
    shapes = matrix_shapes(
        empty_transformer(
            TransformerConfig.from_diffusers(read_json(config), where=str(config)), int8=False, where=config
        )
    )
    try:
        found = load_lora(path, shapes=shapes, base=lambda name: torch.zeros(shapes[name]))
    except CheckpointError as error:
        return str(error), None
    return None, None if rotates else found.digest
