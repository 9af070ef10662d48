"""Write a model, or a part of one, in another layout: diffusers' folder, Limner's int8, the original single files.

Tensors go from file to file one at a time. The target is new and appears whole or not at all; space is checked first.
Nothing is rounded twice, and a part that already has the requested layout and dtype is copied byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.config import TransformerConfig
from limner.errors import InvalidRequest, OutputError
from limner.model.text_encoder import default_out_layers
from limner.model.transformer import Transformer
from limner.weights.checkpoint import Checkpoint
from limner.weights.configuration import CONFIG_KEY
from limner.weights.files import TensorInfo, dtype_name, write_tensors
from limner.weights.folder.kind import HEADER_KEY, find_kind, kind_of_transformer, to_header
from limner.weights.layouts import PARTS
from limner.weights.names import Names, Rule, autoencoder_names, transformer_names
from limner.weights.networks import QUANT_METHOD, empty_autoencoder, empty_text_network, empty_transformer
from limner.weights.parts import STEMS, Progress, check_variant, is_model_folder, open_part, part_of

__all__ = [
    "LAYOUTS",
    "check_int8",
    "convert",
    "expected_tensors",
    "save_network",
    "save_quantized",
    "transformer_config",
]

LAYOUTS = ("diffusers", "int8", "original")
"""The layouts that can be written."""
_INT8 = {"quantization_config": {"quant_method": QUANT_METHOD}}
"""What the configuration of an int8 part says."""
_ORIGINAL_FILES = {
    "transformer": "transformer.safetensors",
    "vae": "ae.safetensors",
    "text_encoder": "text_encoder.safetensors",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Output:
    """A file of weights to write: its header, its tensors one at a time, and its configuration."""

    part: str
    infos: Mapping[str, TensorInfo]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    config: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())


def expected_tensors(checkpoint: Checkpoint, *, int8: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a part's network by name, on the meta device.

    Of a text encoder, layers that are not read and the head are included if the file has them. Raises `CheckpointError`
    unless the file has every tensor that is read.
    """
    config, where = checkpoint.config, checkpoint.where
    if checkpoint.layout.part == "transformer":
        geometry = TransformerConfig.from_diffusers(config, where=str(where))
        expected: dict[str, Tensor] = empty_transformer(geometry, int8=int8, where=where).state_dict()
    elif checkpoint.layout.part == "vae":
        expected = empty_autoencoder(config, where=where).state_dict()
    else:
        depth = int(config["num_hidden_layers"])
        whole = empty_text_network(config, used=depth, depth=depth, where=where, int8=int8).state_dict()
        whole["lm_head.weight"] = whole["embed_tokens.weight"]
        used = max(default_out_layers(depth))
        checkpoint.check(
            empty_text_network(config, used=used, depth=depth, where=where).state_dict(), used=used, depth=depth
        )
        return {name: value for name, value in whole.items() if checkpoint.has(_matrix_of(name))}
    checkpoint.check(expected)
    return expected


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    part: str | None = None,
    like: Path | None = None,
    variant: str | None = None,
    quantize_text: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a file, a part's folder or a model's folder to `target` in the layout `to`; return the bytes of weights.

    A part becomes a folder ("diffusers", "int8") or one .safetensors file ("original"); a model becomes a folder, in
    which "int8" changes the transformer, with `quantize_text` the text encoder too, and "original" makes one file of each
    part. `like` is a model folder whose configurations say what single files do not, `variant` says which weights of
    folders are read. Raises `CheckpointError`, `InvalidRequest` and `OutputError`.
    """
    if to not in LAYOUTS:
        raise InvalidRequest("to", f"{to!r} is not one of {', '.join(LAYOUTS)}")
    if quantize_text and to != "int8":
        raise InvalidRequest("quantize_text", f"is for the layout int8, not for {to}; leave it out")
    found = part_of(source, part=part)
    whole = is_model_folder(source) and part is None
    narrow = ("transformer", "text_encoder") if quantize_text else ("transformer",)
    parts = [name for name in PARTS if to != "int8" or name in narrow] if whole else [found or PARTS[0]]
    if to == "int8" and parts == ["vae"]:
        raise InvalidRequest(
            "to", f"int8 is a layout of the transformer and the text encoder, {source} holds a vae; use diffusers"
        )
    if to == "original" and not whole and target.suffix != ".safetensors":
        raise InvalidRequest(
            "output", f"{target.name} does not end in .safetensors; a part in the original layout is a file"
        )
    outputs = []
    places = {name: source / name if is_model_folder(source) else source for name in parts}
    check_variant(variant, places)
    for name, inside in places.items():
        checkpoint = open_part(name, inside, like=like / name / "config.json" if like else None, variant=variant)
        same = to == "diffusers" and dtype is None and variant is None and checkpoint.layout.kind == "diffusers"
        if not (whole and same):
            outputs.append(_plan(name, checkpoint, to=to, dtype=dtype))
    if not outputs:
        raise InvalidRequest("to", f"{source} is in diffusers' layout already; copy it, or ask for another dtype")
    copied = _others(source, outputs) if whole else []
    _check_space(target, outputs, copied)
    with _new(target) as temporary:
        if to != "original" or whole:
            temporary.mkdir()
        _copy(copied, temporary)
        for output in outputs:
            if to == "original":
                file = temporary / _ORIGINAL_FILES[output.part] if whole else temporary
                header = {CONFIG_KEY: json.dumps(dict(output.config)), **_kind_header(output.part, source)}
                _write(output, file, header, progress)
            else:
                _write_folder(output, temporary / output.part if whole else temporary, progress)
    return sum(output.nbytes for output in outputs)


def _kind_header(part: str, source: Path) -> dict[str, str]:
    """Return the entry of a transformer's header that says its kind, if the source does."""
    if part != "transformer":
        return {}
    found = find_kind(source) if is_model_folder(source) else kind_of_transformer(source)
    return {} if found is None else {HEADER_KEY: to_header(found.kind)}


def save_quantized(transformer: Transformer, source: Path, target: Path) -> None:
    """Write the model folder `source` to `target` with this int8 transformer in place of its own. Raises `OutputError`.

    `target` has to be new. It appears whole or not at all. Raises `InvalidRequest` for weights that are fp8 by now.
    """
    check_int8(transformer)
    tensors = transformer.state_dict()
    output = _Output(
        part="transformer",
        infos={name: _info_of(value) for name, value in tensors.items()},
        tensors=lambda: iter(tensors.items()),
        config=transformer.config.to_diffusers() | _INT8,
    )
    copied = _others(source, [output])
    _check_space(target, [output], copied)
    with _new(target) as temporary:
        temporary.mkdir()
        _copy(copied, temporary)
        _write_folder(output, temporary / "transformer", None)


def save_network(part: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write the folder of a part from tensors in memory. Raises `OSError`."""
    infos = {name: _info_of(value) for name, value in tensors.items()}
    _write_folder(_Output(part=part, infos=infos, tensors=lambda: iter(tensors.items()), config=config), folder, None)


def transformer_config(transformer: Transformer) -> dict[str, Any]:
    """Return the `config.json` of a transformer in memory, wide or int8. Raises `InvalidRequest` for one in fp8."""
    check_int8(transformer)
    return transformer.config.to_diffusers() | ({} if transformer.quantization is None else _INT8)


def check_int8(network: torch.nn.Module) -> None:
    """Raise `InvalidRequest` if int8 weights were rounded to fp8, in which this GPU multiplies: they are not int8."""
    if any(value.dtype == torch.float8_e4m3fn for value in network.state_dict().values()):
        raise InvalidRequest(
            "quantize",
            "the int8 weights of this pipeline were rounded to fp8 for this GPU and are not int8 any more; save it from a "
            "pipeline on device='cpu', or run limner convert",
        )


def _plan(part: str, checkpoint: Checkpoint, *, to: str, dtype: torch.dtype | None) -> _Output:
    """Return what to write for a part in the layout `to`."""
    expected = expected_tensors(checkpoint, int8=to == "int8")
    config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    if part == "transformer":
        config = TransformerConfig.from_diffusers(checkpoint.config).to_diffusers()
    config |= _INT8 if to == "int8" else {}
    infos = {}
    for name, want in expected.items():
        fixed = _is_narrow(name, expected) or name.endswith("num_batches_tracked")
        infos[name] = _info_of(want) if fixed else checkpoint.info(name, dtype)
    if part == "text_encoder":
        kinds = {info.dtype for name, info in infos.items() if not _is_narrow(name, expected)}
        if len(kinds) == 1:
            wide = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kinds.pop())
            config = {k: v for k, v in config.items() if k != "torch_dtype"} | ({"dtype": wide} if wide else {})

    def stream() -> Iterator[tuple[str, Tensor]]:
        return checkpoint.stream(expected, dtype)

    if part == "text_encoder":
        full = {name: name if name == "lm_head.weight" else f"model.{name}" for name in expected}
        return _Output(
            part=part,
            infos={full[name]: info for name, info in infos.items()},
            tensors=lambda: ((full[name], value) for name, value in stream()),
            config=config,
        )
    if to != "original":
        return _Output(part=part, infos=infos, tensors=stream, config=config)
    names = transformer_names() if part == "transformer" else autoencoder_names(len(config["block_out_channels"]))
    return _original(part, checkpoint, infos, names, expected, dtype, config)


def _original(
    part: str,
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    names: Names,
    expected: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    config: Mapping[str, Any],
) -> _Output:
    """Return what to write for a part in the original layout: tensors joined and renamed by the rules of `names`."""
    sources = names.sources(expected)

    def info(rules: list[Rule]) -> TensorInfo:
        first = infos[rules[0].target]
        shape = (len(rules) * first.shape[0], *first.shape[1:]) if first.shape else ()
        shape += (1, 1) if rules[0].pointwise else ()
        return TensorInfo(dtype=first.dtype, shape=shape, nbytes=first.nbytes * len(rules))

    def stream() -> Iterator[tuple[str, Tensor]]:
        for source, rules in sources.items():
            wanted = {rule.target: expected[rule.target] for rule in rules}
            values = [value for _, value in checkpoint.stream(wanted, dtype)]
            if rules[0].swap:
                first, second = values[0].chunk(2)
                values = [second, first]
            value = torch.cat(values) if len(values) > 1 else values[0]
            yield source, value[:, :, None, None] if rules[0].pointwise else value

    return _Output(
        part=part, infos={source: info(rules) for source, rules in sources.items()}, tensors=stream, config=config
    )


def _others(source: Path, outputs: list[_Output]) -> list[Path]:
    """Return what is copied unchanged from a model's folder: everything but the parts that are written."""
    written = {output.part for output in outputs}
    return [path for path in source.iterdir() if path.name not in written]


def _copy(paths: list[Path], folder: Path) -> None:
    for path in paths:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def _write_folder(output: _Output, folder: Path, progress: Progress | None) -> None:
    """Write a part's folder: config.json and one file of weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(output.config), indent=2) + "\n")
    _write(output, folder / f"{STEMS[output.part]}.safetensors", {}, progress)


def _write(output: _Output, path: Path, metadata: Mapping[str, str], progress: Progress | None) -> None:
    def reporting() -> Iterator[tuple[str, Tensor]]:
        for done, item in enumerate(output.tensors()):
            if progress is not None:
                progress(output.part, done, len(output.infos))
            yield item

    write_tensors(path, output.infos, reporting(), metadata=metadata)


def _matrix_of(name: str) -> str:
    """Return the matrix that a scale belongs to; of other tensors their own name."""
    return name.removesuffix("_scale") if name.endswith(".weight_scale") else name


def _is_narrow(name: str, expected: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is an int8 matrix or its scale, whose dtypes are fixed."""
    return expected[_matrix_of(name)].dtype == torch.int8


def _info_of(value: Tensor) -> TensorInfo:
    return TensorInfo(dtype=dtype_name(value.dtype), shape=tuple(value.shape), nbytes=value.nbytes)


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def _check_space(target: Path, outputs: list[_Output], copied: list[Path]) -> None:
    """Raise `OutputError` if the target exists already or does not fit on its disk."""
    needed = sum(output.nbytes for output in outputs) + sum(_size(path) for path in copied)
    if target.exists() or target.is_symlink():
        raise OutputError(f"output: {target} is there already; give a new folder or name")
    try:
        free = shutil.disk_usage(target.absolute().parent).free
    except OSError as error:
        raise OutputError(f"output: {target.parent} cannot be written to ({error.strerror}); make it first") from error
    if needed > free:
        raise OutputError(
            f"output: {target} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free there; free some space, or "
            "write it elsewhere"
        )


@contextlib.contextmanager
def _new(target: Path) -> Iterator[Path]:
    """Give a temporary name for a file or folder, renamed to `target` when the block ends, removed if it fails."""
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        yield temporary
        if target.exists():
            raise OutputError(f"output: {target} is there already; give a new folder or name")
        os.replace(temporary, target)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, shutil.Error)):
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise OutputError(f"output: {target} cannot be written ({reason}); nothing was left there") from error
        raise
