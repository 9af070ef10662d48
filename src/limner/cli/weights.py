"""`limner quantize`, `inspect` and `convert`: weights in files, what they are and writing them in another layout.

Owns what is printed. Layouts and their checks are `limner.weights`'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from limner.cli.options import DTYPES, Commands, add_json
from limner.cli.output import print_result
from limner.cli.parser import add_command
from limner.errors import InvalidRequest

__all__ = ["add_commands", "convert", "inspect", "quantize"]


def add_commands(commands: Commands) -> None:
    """Add `quantize`, `inspect` and `convert`."""
    parser = add_command(
        commands,
        "quantize",
        help="write a model folder with an int8 transformer",
        description="Quantize a model once, to int8.",
        examples=(
            "limner quantize klein-9b-kv -o klein-int8",
            "limner quantize klein-9b-kv -o klein-int8 --quantize-text",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; has to be new")
    parser.add_argument("--quantize-text", action="store_true", help="make the text encoder int8 too")
    _add_dtype(parser)
    _add_variant(parser)
    add_json(parser)
    parser.set_defaults(run=quantize)

    parser = add_command(
        commands,
        "inspect",
        help="what a file or folder of weights is, and what is missing from it",
        description="Layout, geometry, dtypes, bytes and digests of weights, and what is missing; of a LoRA its dialect; "
        "exit code 1 if damaged.",
        examples=(
            "limner inspect flux-2-klein-9b.safetensors",
            "limner inspect style-lora.safetensors --model klein-9b-kv",
            "limner inspect my-model --verify",
        ),
    )
    parser.add_argument(
        "source", metavar="FILE", help="weights: a file of any layout, a LoRA, a part's folder, a model's folder"
    )
    parser.add_argument(
        "--verify", action="store_true", help="load every tensor, look for NaN, give the weights' digest"
    )
    parser.add_argument("--no-digest", action="store_true", help="headers alone: do not read the bytes of the files")
    _add_part(parser)
    parser.set_defaults(run=inspect)

    parser = add_command(
        commands,
        "convert",
        help="write weights in another layout",
        description="Write a model, or a part of one, in another layout. Nothing is written over.",
        examples=("limner convert flux-2-klein-9b.gguf -o transformer --to diffusers --model klein-9b-kv",),
    )
    parser.add_argument("source", metavar="SOURCE", help="a file of any layout, a part's folder, a model's folder")
    parser.add_argument(
        "-o", "--output", required=True, metavar="TARGET", help="folder or file to write; has to be new"
    )
    parser.add_argument("--to", required=True, choices=("diffusers", "int8", "original"), help="layout to write")
    _add_dtype(parser)
    _add_part(parser)
    parser.set_defaults(run=convert)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of what is not int8; default: that of the files")


def _add_part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", choices=("transformer", "vae", "text_encoder"), help="which part, where there are several"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="model folder whose configurations say what a single file does not"
    )
    _add_variant(parser)
    add_json(parser)


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", metavar="NAME", help="which weights of a folder, as fp16: *.fp16.safetensors")


def quantize(args: argparse.Namespace) -> None:
    """Write a model folder with an int8 transformer, and text encoder if that is asked for."""
    import torch

    from limner.weights.convert import convert
    from limner.weights.folder import resolve_model

    source, target = resolve_model(args.model), Path(args.output)
    if target.exists():
        raise InvalidRequest("--output", f"{target} is there already; give a new folder")
    convert(
        source,
        target,
        to="int8",
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        variant=args.variant,
        quantize_text=args.quantize_text,
    )
    nbytes = (target / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    found: dict[str, object] = {"folder": str(target), "nbytes": nbytes}
    if args.quantize_text:
        text = (target / "text_encoder" / "model.safetensors").stat().st_size
        print_result(
            args, found | {"text_encoder_nbytes": text}, f"{target}: {nbytes} bytes, text encoder {text} bytes"
        )
    else:
        print_result(args, found, f"{target}: {nbytes} bytes")


def inspect(args: argparse.Namespace) -> int:
    """Print what weights are; return 1 if they are damaged."""
    from limner.images import printable
    from limner.weights.folder import resolve_model
    from limner.weights.inspect import inspect
    from limner.weights.lora import inspect_lora

    source, like = _source(args.source), resolve_model(args.model) if args.model else None
    report = (None if args.part else inspect_lora(source, like=like)) or inspect(
        source, like=like, part=args.part, digests=not args.no_digest, verify=args.verify, variant=args.variant
    )
    print_result(args, report.as_json(), "\n".join(printable(line) for line in report.lines()))
    return int(not report.whole)


def convert(args: argparse.Namespace) -> None:
    """Write weights in another layout."""
    import torch

    from limner.weights.convert import convert
    from limner.weights.folder import resolve_model

    target = Path(args.output)
    nbytes = convert(
        _source(args.source),
        target,
        to=args.to,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        part=args.part,
        like=resolve_model(args.model) if args.model else None,
        variant=args.variant,
    )
    found = {"output": str(target), "layout": args.to, "nbytes": nbytes}
    print_result(args, found, f"{target}: {nbytes} bytes of weights")


def _source(text: str) -> Path:
    """Return a file or folder as it is, else the folder of a hub id."""
    from limner.weights.folder import resolve_model

    return Path(text) if text and Path(text).exists() else resolve_model(text)
