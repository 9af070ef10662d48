"""`limner plan`: the memory of a request, by component and phase, without loading or computing anything.

Owns the table. The numbers are `limner.memory`'s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.cli.options import DTYPES, Commands, add_json, add_options, check_at_least, size
from limner.cli.output import print_result
from limner.cli.parser import add_command
from limner.grid import check_size
from limner.kinds import guides
from limner.options import ModelOptions

if TYPE_CHECKING:
    from limner.config import ModelGeometry
    from limner.kinds import ModelKind
    from limner.memory import Formats, MemoryPlan, Request, Staging

__all__ = ["add_commands", "plan"]


def add_commands(commands: Commands) -> None:
    """Add `plan`."""
    parser = add_command(
        commands,
        "plan",
        help="how much memory a request takes, and the cheapest setting that fits",
        description="The budget of memory of a request, by component and phase, without loading or computing anything.",
        examples=(
            "limner plan --model klein-9b --references 2 --memory 24GiB",
            "limner plan --model klein-4b --size 512x512 --device cuda",
        ),
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="klein-9b-kv or another short name, a folder or hub id; default: the bundled one",
    )
    parser.add_argument(
        "--references", type=int, default=0, metavar="N", help="number of references (default: %(default)s)"
    )
    parser.add_argument(
        "--reference-size", type=size, default=(1024, 1024), metavar="WxH", help="of each (default: 1024x1024)"
    )
    parser.add_argument(
        "--size", type=size, default=(1024, 1024), metavar="WxH", help="of the output (default: 1024x1024)"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--text", type=int, default=512, metavar="N", help="text tokens (default: %(default)s)")
    parser.add_argument(
        "--canvas", type=size, metavar="WxH", help="a picture of this size is repainted; --size is what is drawn of it"
    )
    parser.add_argument(
        "--preserve", choices=("auto",), help="what an edit did not change is taken from the canvas (default: its size)"
    )
    parser.add_argument("--guidance", type=float, metavar="X", help="guidance scale of base models (default: 4)")
    parser.add_argument("--reference-guidance", type=float, default=1.0, metavar="X", help="of references (default: 1)")
    parser.add_argument("--reuse", choices=("step0",), help="K/V that joint references have in the first step are kept")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="arithmetic (default: %(default)s)")
    parser.add_argument("--quantize", choices=("int8",), help="a model that limner quantize wrote")
    add_options(parser, ModelOptions, only=("quantize_text", "kv_cache_dtype", "references_attention"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: %(default)s)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="what there is, as 24GiB: finds the cheapest setting that fits"
    )
    add_json(parser)
    parser.set_defaults(run=plan)


def plan(args: argparse.Namespace) -> None:
    """Print how much memory a request takes, in these formats or in the cheapest that fit."""
    from limner.memory import cheapest, make_plan, parse_bytes

    check_at_least(0, args, "references")
    check_at_least(1, args, "num_images", "text")
    for flag, sides in (("--size", args.size), ("--reference-size", args.reference_size)):
        for side in sides:
            check_size(flag, side)
    limit = None if args.memory is None else parse_bytes(args.memory, field="--memory")
    geometry, int8, kind = _geometry(args.model)
    kind = kind.with_references(args.references_attention)
    formats = _formats(args, int8=int8)
    request = _request(args, kind)
    if limit is not None:
        made = cheapest(geometry, request, formats=formats, limit=limit, device=args.device, field="--memory")
    else:
        made = make_plan(geometry, request, formats=formats, device=args.device)
    stagings: tuple[Staging, ...] = ("whole", "parts", "layers")
    peaks = {
        how: make_plan(geometry, request, formats=made.formats, device=args.device, staging=how, limit=0).peak
        for how in stagings
    }
    found = {
        "model": args.model or "bundled",
        "references_attention": kind.references,
        **made.as_json(),
        "peaks": peaks,
        "options": _options(args, made),
    }
    print_result(args, found, "\n".join(_lines(found)))


def _request(args: argparse.Namespace, kind: ModelKind) -> Request:
    """Return the request of a plan. Raises `InvalidRequest`."""
    from limner.memory import Request
    from limner.requests import check_guidance

    check_guidance(args.guidance)
    if args.reuse is not None or args.reference_guidance != 1:
        from limner.pipeline.control import check_reference_guidance, check_reuse  # a pipeline takes long to import

        check_reuse(args.reuse, kind=kind)
        check_reference_guidance(args.reference_guidance, args.references)
    canvas = args.canvas or (args.size if args.preserve else None)
    pixels = 0 if canvas is None else canvas[0] * canvas[1]
    return Request(
        size=args.size,
        references=(args.reference_size,) * args.references,
        batch=args.num_images,
        num_text=args.text,
        joint=kind.joint,
        guides=guides(kind, args.guidance),
        guides_references=args.reference_guidance != 1,
        reuses=args.reuse is not None and args.references > 0,
        canvas_pixels=pixels,
        result_pixels=pixels * args.num_images,
        preserves=args.preserve is not None,
    )


def _geometry(model: str | None) -> tuple[ModelGeometry, frozenset[str], ModelKind]:
    """Return a geometry by name or from a folder's configurations, the parts that are int8, and the kind."""
    from limner.config import AutoencoderConfig, ModelGeometry, TextConfig, TransformerConfig
    from limner.models import published

    if model is not None and not Path(model).exists() and (known := published(model)):
        return known.geometry, frozenset(), known.kind
    from limner.weights.folder import find_kind, read_json, resolve_model
    from limner.weights.parts import says_int8

    folder = resolve_model(model)
    configs = {part: read_json(folder / part / "config.json") for part in ("transformer", "text_encoder", "vae")}
    geometry = ModelGeometry(
        transformer=TransformerConfig.from_diffusers(configs["transformer"]),
        text_encoder=TextConfig.from_transformers(configs["text_encoder"]),
        autoencoder=AutoencoderConfig.from_diffusers(configs["vae"]),
    )
    int8 = frozenset(part for part, config in configs.items() if says_int8(config))
    return geometry, int8, find_kind(folder).kind


def _formats(args: argparse.Namespace, *, int8: frozenset[str]) -> Formats:
    from limner.memory import Formats

    packed, threads = False, 0
    if args.device == "cpu":
        from limner.model.int8 import packs_weights, tile_threads

        packed, threads = packs_weights(), tile_threads()
    return Formats(
        itemsize=4 if args.dtype == "float32" else 2,
        quantize="int8" if "transformer" in int8 else args.quantize,
        quantize_text="text_encoder" in int8 or args.quantize_text,
        kv=args.kv_cache_dtype,
        packed=packed,
        tile_threads=threads,
    )


def _options(args: argparse.Namespace, plan: MemoryPlan) -> str:
    """Return the options of `limner edit` that a plan stands for."""
    options = []
    if args.device != "cpu":
        options.append(f"--device {args.device}")
    if plan.staging != "whole" and args.memory is not None:
        options.append(f"--memory-limit {args.memory}")
    if plan.formats.kv:
        options.append(f"--kv-cache-dtype {plan.formats.kv}")
    if plan.formats.quantize:
        text = " --quantize-text" if plan.formats.quantize_text else ""
        options.append(f"--model FOLDER, one that limner quantize{text} wrote")
    elif plan.formats.quantize_text:
        options.append("--text-encoder FOLDER, one that limner convert --part text_encoder --to int8 wrote")
    return " ".join(options)


def _lines(found: dict[str, Any]) -> list[str]:
    def gib(number: int) -> str:
        return f"{number / 2**30:9.2f}"

    lines = [f"{found['model']} on {found['device']}, {found['references_attention']} references, GiB", ""]
    lines += [f"{name:38} {gib(nbytes)}" for name, nbytes in found["components"].items()]
    lines += ["", f"{'phase':20} {'anonymous':>9} {'files':>9} {'total':>9}"]
    lines += [
        f"{name:20} {gib(p['anonymous'])} {gib(p['file_backed'])} {gib(p['total'])}"
        for name, p in found["phases"].items()
    ]
    lines += ["", f"peak, weights {found['staging']:24} {gib(found['peak'])}"]
    lines += [f"least peak, weights {how:18} {gib(peak)}" for how, peak in found["peaks"].items()]
    if found["device"] != "cpu":
        lines.append(f"{'beside the device, on the host':38} {gib(found['host'])}")
    if found["options"]:
        lines.append(f"options: {found['options']}")
    return lines
