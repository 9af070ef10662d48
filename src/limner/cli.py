"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2.

Imports nothing heavy before a command runs; knows nothing of models beyond the pipeline's public names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from limner import __version__
from limner.config import ReferencePolicy
from limner.errors import InvalidRequest, LimnerError

if TYPE_CHECKING:
    from limner.images import PreparedReference
    from limner.pipeline import Pipeline, PipelineOutput

__all__ = ["build_parser", "main"]

DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"limner: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="limner", description="Draw and edit pictures; the K/V of references are computed once and kept."
    )
    parser.add_argument("--version", action="version", version=f"limner {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    edit = commands.add_parser(
        "edit", help="edit with one or many reference pictures", description="Edit with references."
    )
    _drawing_arguments(edit)
    edit.add_argument(
        "-i", "--image", action="append", required=True, metavar="FILE", help="a reference; again for image 2, 3, ..."
    )
    _reference_arguments(edit)
    edit.set_defaults(run=_draw)

    generate = commands.add_parser("generate", help="draw from text alone", description="Draw from text alone.")
    _drawing_arguments(generate)
    generate.set_defaults(run=_draw, image=[], background=None, max_pixels=None)

    refs = commands.add_parser("refs", help="look at references", description="Look at references.")
    refs_commands = refs.add_subparsers(dest="refs_command", metavar="COMMAND", required=True, parser_class=_Parser)
    inspect = refs_commands.add_parser(
        "inspect",
        help="what becomes of pictures as references, or what a pack holds",
        description="Say what becomes of pictures as references (in this order), or what a reference pack holds.",
    )
    inspect.add_argument("file", nargs="+", metavar="FILE", help="pictures, or one pack (.safetensors)")
    inspect.add_argument("--model", metavar="MODEL", help="folder or hub id; default: the bundled model")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    _reference_arguments(inspect)
    inspect.set_defaults(run=_inspect)
    return parser


def _drawing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw or to change")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="picture to write: .png, .jpg, .jpeg or .webp"
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="seed of the first image, the next has N + 1; default: drawn"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="number of steps (default: 4)")
    parser.add_argument(
        "--size", type=_size, metavar="WxH", help="multiples of 16; default: first reference, or the model's"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="images to make; files get -1, -2, ...")
    parser.add_argument("--model", metavar="MODEL", help="folder or hub id; default: the bundled model")
    parser.add_argument("--dtype", choices=DTYPES, help="arithmetic; default: that of the files")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: files, seeds, sizes, timings")


def _reference_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--background", metavar="COLOUR", help="what stands behind transparent references, as white or #fff"
    )
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="scale larger references down to N pixels (1048576)"
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as 512x512")
    return int(match[1]), int(match[2])


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
    except LimnerError as error:
        print(f"limner: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("limner: interrupted", file=sys.stderr)
        return 130
    return 0


def _output_files(output: str, num_images: int) -> list[Path]:
    """out.png, or out-1.png, out-2.png, ...; each checked before work is spent."""
    from limner.images import check_output

    path = Path(output)
    if not 1 <= num_images <= 1000:
        raise InvalidRequest("--num-images", f"{num_images} is not within 1 to 1000")
    if num_images == 1:
        return [check_output(path)]
    return [check_output(path.with_stem(f"{path.stem}-{i}")) for i in range(1, num_images + 1)]


def _policy(args: argparse.Namespace) -> ReferencePolicy:
    policy = ReferencePolicy(background=args.background)
    return policy if args.max_pixels is None else replace(policy, max_pixels=args.max_pixels)


def _prepare(args: argparse.Namespace, files: Sequence[str]) -> list[PreparedReference]:
    """The references of a command, or the error that names the one that cannot be used."""
    if not files:
        return []
    from limner.images import prepare_reference

    policy = _policy(args)
    return [prepare_reference(file, policy=policy, field=f"image {i}") for i, file in enumerate(files, start=1)]


class _Progress:
    """One bar over load, text, references, steps and decode; silent unless stderr is a terminal."""

    def __init__(self, *, num_steps: int, references: bool) -> None:
        from tqdm import tqdm

        self._weights = {"load": 3, "text": 1, "references": 1 if references else 0, "step": num_steps, "decode": 1}
        self._bar = tqdm(total=sum(self._weights.values()), disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, part: str, done: int, of: int) -> None:
        names = list(self._weights)
        before = sum(self._weights[name] for name in names[: names.index(part)])
        self._bar.set_description(part)
        self._bar.n = before + self._weights[part] * done // max(of, 1)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _draw(args: argparse.Namespace) -> None:
    files = _output_files(args.output, args.num_images)
    if args.steps < 1:
        raise InvalidRequest("--steps", f"{args.steps} is not a number of steps; use 1 or more")

    if not args.prompt.strip():
        raise InvalidRequest("prompt", f"{args.prompt!r} is empty; say what to draw or to change")
    references = _prepare(args, args.image)  # bad ones are refused before a model is loaded

    import torch

    from limner.images import save
    from limner.pipeline import Pipeline

    progress = _Progress(num_steps=args.steps, references=bool(args.image))
    try:
        pipe = Pipeline.from_pretrained(
            args.model,
            torch_dtype=getattr(torch, args.dtype) if args.dtype else None,
            device=args.device,
            progress=progress,
        )
        generators = None
        if args.seed is not None:
            generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
        width, height = args.size or (None, None)
        out = pipe(
            args.prompt,
            image=references or None,
            width=width,
            height=height,
            num_inference_steps=args.steps,
            num_images_per_prompt=args.num_images,
            generator=generators,
            return_dict=True,
            progress=progress,
        )
    finally:
        progress.close()
    assert not isinstance(out, tuple)
    for file, picture, seed in zip(files, out.images, out.seeds, strict=True):
        save(
            picture,
            file,
            metadata={
                "prompt": args.prompt,
                "seed": seed,
                "model": pipe.digest,
                "version": __version__,
                **out.metadata,
            },
        )
    _print_result(args, pipe, out, files)


def _print_result(args: argparse.Namespace, pipe: Pipeline, out: PipelineOutput, files: list[Path]) -> None:
    from limner.images import printable

    if args.json:
        result = {
            "outputs": [{"file": str(file), "seed": seed} for file, seed in zip(files, out.seeds, strict=True)],
            "prompt": {"text": args.prompt, **asdict(out.prompts[0])},
            "references": [
                {"file": file, **asdict(report)} for file, report in zip(args.image, out.references, strict=True)
            ],
            "reference_cache": out.reference_cache,
            "timings": {**asdict(out.timings), "total": out.timings.total},
            "version": __version__,
            "model": pipe.digest,
            **{k: v for k, v in out.metadata.items() if k != "references"},
        }
        print(json.dumps(result))
        return
    for number, (file, report) in enumerate(zip(args.image, out.references, strict=True), start=1):
        print(f"image {number}: {printable(file)}: {report.describe()}")
    if out.prompts[0].cut:
        cut = out.prompts[0]
        print(f"prompt: {cut.num_tokens} tokens, {cut.limit} are read; cut: {cut.cut!r}")
    for file, seed in zip(files, out.seeds, strict=True):
        size = f"{out.metadata['width']}x{out.metadata['height']}"
        print(f"{printable(str(file))}: seed {seed}, {size}, {out.timings.total:.2f} s")


def _inspect(args: argparse.Namespace) -> None:
    from limner.images import printable

    found: dict[str, Any]
    if any(Path(file).suffix == ".safetensors" for file in args.file):
        from limner.references import References

        if len(args.file) > 1:
            raise InvalidRequest("FILE", f"{len(args.file)} files, one of them a pack; inspect packs one at a time")
        refs = References.load(args.file[0])
        found = {
            "key": refs.key,
            "weights": refs.weights,
            "dtype": str(refs.dtype).removeprefix("torch."),
            "kernel": refs.kernel,
        }
        found |= {"num_tokens": refs.num_tokens, "nbytes": refs.nbytes}
        names, reports = [f"image {i}" for i in range(1, len(refs.reports) + 1)], refs.reports
    else:
        from limner.config import TransformerConfig
        from limner.weights.folder import read_json, resolve_model

        names = list(args.file)
        reports = tuple(reference.report for reference in _prepare(args, args.file))
        config = TransformerConfig.from_diffusers(read_json(resolve_model(args.model) / "transformer" / "config.json"))
        num_tokens = sum(w * h for w, h in (r.processed_size for r in reports)) // 256
        found = {"num_tokens": num_tokens, "nbytes_bfloat16": num_tokens * config.num_layers * 2 * config.width * 2}
    found["references"] = [{"name": name, **asdict(report)} for name, report in zip(names, reports, strict=True)]
    if args.json:
        print(json.dumps(found))
        return
    for name, report in zip(names, reports, strict=True):
        print(f"{printable(name)}: {report.describe()}; digest {report.digest[:16]}")
    for name, value in found.items():
        if name != "references":
            print(f"{name}: {value}")
