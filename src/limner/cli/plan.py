"""`limner plan`: the memory of a request, by component and phase, without loading or computing anything.

Owns the table, what its lines mean, and the command that draws with what was found. The numbers are `limner.memory`'s.
"""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.cli.options import DTYPES, Commands, add_json, add_options, check_at_least, size
from limner.cli.output import print_result
from limner.cli.parser import add_command
from limner.grid import PIXELS, check_size
from limner.kinds import guides
from limner.options import ModelOptions

if TYPE_CHECKING:
    from limner.config import ModelGeometry
    from limner.kinds import ModelKind
    from limner.memory import Formats, MemoryPlan, Request, Staging

__all__ = ["add_commands", "plan"]

_MEANINGS = {
    "text_encoder weights": "reads the prompt",
    "transformer weights": "draws, in each step",
    "autoencoder weights": "pictures to latents and back",
    "int8 weights as packed for this CPU": "a second copy, in the order of its products",
    "K/V of references": "what is kept of them, for any prompt",
    "prompt": "its tokens, as the transformer reads them",
    "activations": "what the largest phase computes with",
    "canvases": "pictures that are repainted",
    "process": "Python, torch, libraries",
    "encode text": "the prompt is read",
    "encode references": "references become latents",
    "prefill": "K/V of references are computed, unless they are kept",
    "denoise": "the steps",
    "decode": "latents become the picture",
    "put back": "what was drawn is put into the canvas",
    "whole": "all networks stay in memory",
    "parts": "one network at a time, the others are read again",
    "layers": "a network's layers by turns too, which is slow",
}
"""What the lines of the table mean."""


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
        "--reference-size", type=size, metavar="WxH", help="of each, as the model reads it (default: the largest)"
    )
    parser.add_argument("--size", type=size, metavar="WxH", help="of the output (default: the model's, or 1024x1024)")
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
    parser.add_argument("--dtype", choices=DTYPES, help="arithmetic (default: the model's, or bfloat16)")
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
        for side in sides or ():
            check_size(flag, side)
    limit = None if args.memory is None else parse_bytes(args.memory, field="--memory")
    model = _model(args.model)
    geometry, kind = model.geometry, model.kind.with_references(args.references_attention)
    args.size = args.size or model.size
    args.reference_size = args.reference_size or model.reference_size
    formats = _formats(args, model)
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
        "download": model.download,
        "request": {
            "size": args.size,
            "num_images": args.num_images,
            "references": args.references,
            "reference_size": args.reference_size,
            "canvas": args.canvas,
            "text_tokens": args.text,
            "num_inference_steps": kind.num_inference_steps,
            "dtype": args.dtype or model.dtype,
        },
        **made.as_json(),
        "peaks": peaks,
        "options": _options(args, made),
        "commands": _commands(args, made, model),
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """What a plan needs of a model: `int8` parts of its files, sizes that it draws and reads unless asked otherwise.

    `download` is about how many bytes its files have, of a published one. `max_pixels` is its cap on references.
    """

    geometry: ModelGeometry
    kind: ModelKind
    int8: frozenset[str] = frozenset()
    dtype: str = "bfloat16"
    size: tuple[int, int] = (1024, 1024)
    max_pixels: int = 1024 * 1024
    reference_size: tuple[int, int] = (1024, 1024)
    download: int | None = None


def _model(name: str | None) -> _Model:
    """Return a model by name, or from a folder's configurations."""
    from limner.config import AutoencoderConfig, ModelGeometry, ReferencePolicy, TextConfig, TransformerConfig
    from limner.models import published

    if name is not None and not Path(name).exists() and (known := published(name)):
        return _Model(geometry=known.geometry, kind=known.kind, download=known.download)
    from limner.weights.folder import read_json, read_settings, resolve_model
    from limner.weights.parts import says_int8

    folder = resolve_model(name)
    configs = {part: read_json(folder / part / "config.json") for part in ("transformer", "text_encoder", "vae")}
    settings = read_settings(folder)
    cap = ReferencePolicy().for_model(settings.max_reference_pixels).pixels
    side = math.isqrt(cap) // PIXELS * PIXELS
    under = [size for size in settings.sizes if size[0] * size[1] <= cap]
    return _Model(
        geometry=ModelGeometry(
            transformer=TransformerConfig.from_diffusers(configs["transformer"]),
            text_encoder=TextConfig.from_transformers(configs["text_encoder"]),
            autoencoder=AutoencoderConfig.from_diffusers(configs["vae"]),
        ),
        kind=settings.kind.kind,
        int8=frozenset(part for part, config in configs.items() if says_int8(config)),
        dtype=str(settings.default_dtype or "bfloat16").removeprefix("torch."),
        size=settings.default_size,
        max_pixels=cap,
        reference_size=max(under, key=lambda size: size[0] * size[1], default=(side, side)),
    )


def _formats(args: argparse.Namespace, model: _Model) -> Formats:
    from limner.memory import Formats

    packed, threads = False, 0
    if args.device == "cpu":
        from limner.model.int8 import packs_weights, tile_threads

        packed, threads = packs_weights(), tile_threads()
    return Formats(
        itemsize=4 if (args.dtype or model.dtype) == "float32" else 2,
        quantize="int8" if "transformer" in model.int8 else args.quantize,
        quantize_text="text_encoder" in model.int8 or args.quantize_text,
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


def _commands(args: argparse.Namespace, plan: MemoryPlan, model: _Model) -> list[str]:
    """Return the commands that draw what was planned: the last one draws, those before it write what it needs."""
    before, name, options = [], args.model, []
    int8_text = plan.formats.quantize_text and "text_encoder" not in model.int8
    if plan.formats.quantize and "transformer" not in model.int8:
        if name is None:
            options += ["--quantize int8", *(["--quantize-text"] if int8_text else [])]
        else:
            folder = f"{Path(name).name}-int8"
            text = " --quantize-text" if int8_text else ""
            before.append(f"limner quantize {shlex.quote(name)} -o {shlex.quote(folder)}{text}")
            name = folder
    elif int8_text and name is not None:
        folder = shlex.quote(f"{Path(name).name}-text-int8")
        before.append(f"limner convert {shlex.quote(name)} -o {folder} --part text_encoder --to int8")
        options.append(f"--text-encoder {folder}")
    elif int8_text:
        options.append("--quantize-text")
    repaints = args.canvas is not None or args.preserve is not None
    num_pictures = max(args.references, int(repaints))
    words = ["limner edit" if num_pictures else "limner generate", '"PROMPT"']
    words += [f"-i image-{number}.png" for number in range(1, num_pictures + 1)]
    words += ["--preserve auto"] if args.preserve else ["--mask mask.png"] if repaints else []
    words += [] if repaints else ["--size {}x{}".format(*args.size)]
    words += [f"--model {shlex.quote(name)}"] if name is not None else []
    pixels = args.reference_size[0] * args.reference_size[1]
    asked = {
        "--max-pixels": pixels if args.references and args.reference_size != model.reference_size else None,
        "--num-images": args.num_images if args.num_images > 1 else None,
        "--guidance": args.guidance,
        "--reference-guidance": args.reference_guidance if args.reference_guidance != 1 else None,
        "--reuse": args.reuse if args.references else None,
        "--references-attention": args.references_attention,
        "--kv-cache-dtype": plan.formats.kv if args.references else None,
        "--dtype": args.dtype,
        "--device": args.device if args.device != "cpu" else None,
        "--memory-limit": args.memory if plan.staging != "whole" else None,
    }
    options += [f"{option} {value}" for option, value in asked.items() if value is not None]
    return [*before, " ".join([*words, *options, "-o picture.png"])]


def _lines(found: dict[str, Any]) -> list[str]:
    def gib(number: int) -> str:
        return f"{number / 2**30:9.2f}"

    def meaning(name: str) -> str:
        return f"  {_MEANINGS.get(name, '')}".rstrip()

    def shape(size: tuple[int, int]) -> str:
        return "{}x{}".format(*size)

    asked = found["request"]
    references = f"{asked['references']} of {shape(asked['reference_size'])}" if asked["references"] else "none"
    how = f"{found['model']} on {found['device']}, {found['references_attention']} references, {asked['dtype']}"
    lines = [how]
    if found["download"] is not None:
        lines.append(f"download: about {found['download'] / 1e9:.0f} GB")
    lines += [
        "",
        "the plan is for",
        f"  pictures     {asked['num_images']} of {shape(asked['size'])} at once (--num-images, --size)",
        f"  references   {references} (--references, --reference-size: as the model reads them)",
        *([f"  canvas       {shape(asked['canvas'])}, repainted (--canvas)"] if asked["canvas"] else []),
        f"  prompt       up to {asked['text_tokens']} tokens (--text)",
        f"  steps        {asked['num_inference_steps']}; another number takes the same memory",
        "",
        "what is in memory, in GiB",
    ]
    lines += [f"{name:38} {gib(nbytes)}{meaning(name)}" for name, nbytes in found["components"].items()]
    lines += [
        "",
        "each phase in GiB: "
        + (
            "memory of the process, and pages of files, which the system can drop and read again"
            if found["device"] == "cpu"
            else "all on the device"
        ),
        f"{'phase':20} {'own':>9} {'files':>9} {'total':>9}",
    ]
    lines += [
        f"{name:20} {gib(p['anonymous'])} {gib(p['file_backed'])} {gib(p['total'])}{meaning(name)}"
        for name, p in found["phases"].items()
    ]
    lines += ["", f"peak, weights {found['staging']:24} {gib(found['peak'])}  the largest phase, as planned"]
    lines += [f"least peak, weights {how:18} {gib(peak)}{meaning(how)}" for how, peak in found["peaks"].items()]
    if found["device"] != "cpu":
        lines.append(f"{'beside the device, on the host':38} {gib(found['host'])}  memory of the machine")
    lines += ["", "to draw it:", *(f"  {command}" for command in found["commands"])]
    return lines
