"""`limner edit` and `limner generate`: one prompt to one picture or several, also under torchrun.

Owns names of files, what is refused before a model is loaded, and what is printed. What a request may be, others know.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import ranks
from limner.cli.control import add_control, control_of
from limner.cli.names import in_options
from limner.cli.options import Commands, add_json, add_options, from_args, open_optional_store, seed, size
from limner.cli.parser import add_command, options_of
from limner.cli.typed import PICTURES
from limner.errors import InvalidRequest, OutputError
from limner.files import open_regular
from limner.grid import in_words
from limner.options import ModelOptions, StoreOptions
from limner.version import __version__

if TYPE_CHECKING:
    from limner.images import PreparedReference, ReferenceReport
    from limner.pipeline import Pipeline, PipelineOutput
    from limner.requests import EditRequest

__all__ = ["add_commands", "edit", "generate", "prepare"]

_MAX_STDIN = 1 << 20
"""Bytes that are read of a prompt on stdin; a longer one is over the limit on prompts anyway."""
_OF_REFERENCES = ("background", "max_pixels", "fit", "kv_cache_dtype")


def add_commands(commands: Commands) -> None:
    """Add `edit` and `generate`."""
    parser = add_command(
        commands,
        "edit",
        help="edit with one or many reference pictures",
        description="Edit with references.",
        examples=(
            'limner edit "use the background of image 2" -i cat.png -i beach.png',
            'limner edit "remove the cat" -i photo.png --mask mask.png -o without.png',
            'limner edit "a red sofa" -i room.png --model klein-9b-kv --seed 7 --num-images 4',
            'echo "make it snow" | limner edit - -i photo.png',
        ),
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw or to change; - reads it from stdin")
    parser.add_argument("-i", "--image", action="append", metavar="FILE", help="a reference; again for image 2, 3, ...")
    parser.add_argument("--references", metavar="PACK", help="a pack of references (limner refs pack) instead of -i")
    parser.add_argument(
        "--reuse",
        choices=("step0",),
        help="approximate, for joint references: the K/V that they have in the first step serve the others",
    )
    _add_drawing(parser)
    add_control(parser)
    add_options(parser, ModelOptions, StoreOptions)
    parser.set_defaults(run=edit, under_torchrun=True)

    parser = add_command(
        commands,
        "generate",
        help="draw from text alone",
        description="Draw from text alone.",
        examples=(
            'limner generate "a big rocket in the night sky" -o rocket.png --seed 3',
            'limner generate "a lighthouse at dawn" --model klein-4b --size 1024x768',
        ),
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw; - reads it from stdin")
    parser.add_argument("-i", "--image", action="append", help=argparse.SUPPRESS)  # refused with the remedy
    _add_drawing(parser)
    add_options(parser, ModelOptions, without=_OF_REFERENCES)
    parser.set_defaults(run=generate, under_torchrun=True)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the picture")
    group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="picture to write: .png, .jpg, .jpeg or .webp; default: limner-N.png, the next number that is free",
    )
    group.add_argument("--force", action="store_true", help="replace a file that Limner did not make")
    group.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="multiples of 16; default: that in which image 1 is used, or the model's",
    )
    group.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="images to make; files get -1, -2, ... (default: 1)"
    )
    add_json(group, help="print one JSON object: files, seeds, sizes, timings")
    group = parser.add_argument_group("drawing")
    group.add_argument(
        "--seed", type=seed, metavar="N", help="seed of the first image, the next has N + 1; default: drawn"
    )
    group.add_argument("--steps", type=int, metavar="N", help="number of steps; default: 4, of base models 50")
    group.add_argument(
        "--guidance", type=float, metavar="X", help="guidance scale of base models (default: 4; 1 is none)"
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance goes away from (base models)")
    group.add_argument(
        "--parallel",
        choices=("tensor", "sequence"),
        help="under torchrun: what is divided among its processes, heads and MLP (tensor, the default) or tokens",
    )


def edit(args: argparse.Namespace) -> None:
    """Draw with references: pictures, or a pack."""
    with _processes(args) as process:
        files = _check(args, process)
        if bool(args.image) == bool(args.references):
            raise InvalidRequest(
                "--image",
                "give either pictures (-i FILE, again for more) or one pack (--references PACK); without references: "
                "limner generate",
            )
        if args.references:
            _check_alone(args)
            _check_pack(args.references)
        _draw(args, process, files=files, images=args.image or [], pack=args.references)


def generate(args: argparse.Namespace) -> None:
    """Draw without references."""
    with _processes(args) as process:
        files = _check(args, process)
        if args.image:
            raise InvalidRequest("--image", "generate draws without references; with them: limner edit PROMPT -i FILE")
        _draw(args, process, files=files, images=[], pack=None)


@dataclass(frozen=True, slots=True)
class _Process:
    """This process's part: `writes` files and prints for all. `parallel` None: it is the only one."""

    writes: bool
    parallel: str | None


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator[_Process]:
    if ranks.started():
        with ranks.together(args.device) as writes:
            yield _Process(writes, args.parallel or "tensor")
        return
    if args.parallel is not None:
        raise InvalidRequest(
            "--parallel",
            f"{args.parallel} needs several processes; start them with torchrun --nproc-per-node 2 -m limner "
            f"{args.command} ..., or leave it out",
        )
    yield _Process(True, None)


def _check(args: argparse.Namespace, process: _Process) -> list[Path] | None:
    """Return the files to write, after checking all that can be without reading a picture or a model.

    None if no name is given: names are taken when there are pictures.
    """
    from limner.requests import check_prompt

    args.prompt = _read_prompt(args.prompt)
    files = _output_files(args.output, args.num_images, force=args.force) if process.writes else None
    if args.steps is not None and args.steps < 1:
        raise InvalidRequest("--steps", f"{args.steps} is not a number of steps; use 1 or more")
    check_prompt(args.prompt)
    return files


def _read_prompt(given: str) -> str:
    """Return the prompt; that of stdin for "-", without the newline at its end."""
    if given != "-":
        if len(given) < 1000 and Path(given).suffix.lower() in PICTURES and os.path.exists(given):
            raise InvalidRequest(
                "PROMPT",
                f"{given!r} is a file here; the prompt is a text in quotes, and each picture has its own -i: -i {given}",
            )
        return given
    if ranks.started():
        raise InvalidRequest(
            "PROMPT", "- reads one stdin, and torchrun started several processes; give the prompt as a word"
        )
    if sys.stdin is None:
        raise InvalidRequest("PROMPT", "- reads stdin, which is closed; give the prompt as a word")
    try:
        return sys.stdin.buffer.read(_MAX_STDIN).decode().rstrip("\r\n")
    except OSError as error:
        raise InvalidRequest("PROMPT", f"stdin cannot be read ({error.strerror}); give the prompt as a word") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest("PROMPT", f"what stdin gives is no UTF-8 text ({error}); give text") from None


def _output_files(output: str | None, num_images: int, *, force: bool) -> list[Path] | None:
    """Return out.png, or out-1.png, out-2.png, ...; None without a name, if pictures can be written here.

    Raises `OutputError` where there is a file that Limner did not make, as a photo, unless `force`.
    """
    from limner.images import check_output, is_ours, numbered

    if not 1 <= num_images <= 1000:
        raise InvalidRequest("--num-images", f"{num_images} is not within 1 to 1000")
    if output is None:
        check_output("limner-0.png")
        return None
    files = [check_output(path) for path in numbered(Path(output), num_images)]
    for file in files if not force else ():
        if file.exists() and not is_ours(file):
            raise OutputError(
                f"output: {file} is there already, and Limner did not make it; add --force to replace it, or give "
                "another name"
            )
    return files


def _check_alone(args: argparse.Namespace) -> None:
    """Refuse what would change a pack."""
    for name in (*_OF_REFERENCES, "store", "store_cache"):
        if getattr(args, name) is not None:
            raise InvalidRequest(
                f"--{name.replace('_', '-')}", "a pack is used as it is; leave this out, or give pictures (-i FILE)"
            )


def _check_pack(path: str) -> None:
    """Refuse a folder or a picture in place of a pack, with the option that takes it."""
    from limner.images.formats import format_of, other_file

    if os.path.isdir(path):
        raise InvalidRequest(
            "--references",
            f"{path} is a folder, and a pack is one file; what a store keeps is found by its pictures: "
            f"--store {path} -i FILE",
        )
    head = b"?"
    with (
        contextlib.suppress(OSError, ValueError),
        open_regular(path) as file,
    ):  # what cannot be read is told in reading it
        head = file.read(4096)
    if (kind := format_of(head)) is not None:
        raise InvalidRequest("--references", f"{path} is a {kind.upper()} picture, not a pack; give it as -i {path}")
    if (found := other_file(head)) is not None and head[8:9] != b"{":
        raise InvalidRequest(
            "--references", f"{path} is {found[0]}, not a pack; limner refs pack makes one (.safetensors) of pictures"
        )


def prepare(files: Sequence[str], options: ModelOptions) -> tuple[PreparedReference, ...]:
    """Return the references of a command. Raises `InvalidRequest` that names the one that cannot be used."""
    if not files:
        return ()
    from limner.engine.load import reference_policy
    from limner.images import prepare_references

    return prepare_references(list(files), policy=reference_policy(options))


def _draw(
    args: argparse.Namespace, process: _Process, *, files: list[Path] | None, images: list[str], pack: str | None
) -> None:
    options = from_args(ModelOptions, args)
    prepared = prepare(images, options)  # bad ones are refused before a model is loaded

    from limner.engine.load import check_model, load_pipeline
    from limner.pipeline.progress_bar import LOADING, reporting
    from limner.references import References

    check_model(options)
    references = References.load(pack) if pack else None
    store = open_optional_store(from_args(StoreOptions, args))
    with reporting(None if process.writes else False, parts=LOADING) as progress:
        pipe = load_pipeline(options, store=store, parallel=process.parallel, progress=progress)
        request = _request(args, prepared, pipe, images=images)
        out = pipe.draw(
            [request], references=references, output_type="pil" if process.writes else "latent", progress=progress
        )
    written = _save(args, pipe, out, files) if process.writes else []
    if store is not None:
        store.flush()
    if process.writes:
        names = images or [str(pack)] * len(out.references)
        repainted = prepared[0].report if request.canvas is not None else None
        _print(args, pipe, out, files=written, names=names, repainted=repainted)


def _request(
    args: argparse.Namespace, references: tuple[PreparedReference, ...], pipe: Pipeline, *, images: list[str]
) -> EditRequest:
    """Return what the command asks the model for."""
    from limner.pipeline.noise import draw_seeds
    from limner.requests import Control, EditRequest

    width, height = args.size or (None, None)
    first = args.seed
    control, canvas = control_of(args, images) if args.command == "edit" else (Control(), None)
    return EditRequest(
        prompt=args.prompt,
        seeds=tuple(
            draw_seeds(args.num_images, ranks=pipe.networks.ranks)  # the same in every process of a parallel model
            if first is None
            else range(first, first + args.num_images)
        ),
        references=references,
        width=width,
        height=height,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative_prompt,
        reuse=getattr(args, "reuse", None),
        control=control,
        canvas=canvas,
    )


@dataclass(frozen=True, slots=True)
class _Written:
    """A picture's file, and what is known of the picture that it replaced: the metadata, empty of a foreign one."""

    file: Path
    replaced: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        if self.replaced is None:
            return {"file": str(self.file)}
        return {"file": str(self.file), "replaced": {name: self.replaced.get(name) for name in ("seed", "prompt")}}

    def describe(self) -> str | None:
        """Return the line that says what was replaced, with what draws it again."""
        if self.replaced is None:
            return None
        if "seed" not in self.replaced:
            return f"{self.file}: replaced another file, as --force says"
        return (
            f"{self.file}: replaced an earlier picture of Limner (seed {self.replaced['seed']}, prompt "
            f"{self.replaced.get('prompt')!r}); give another name with -o, or none, to keep both"
        )


def _save(args: argparse.Namespace, pipe: Pipeline, out: PipelineOutput, files: list[Path] | None) -> list[_Written]:
    """Write the pictures, and return their files: those given, or the next limner-N.png that are free."""
    from limner.images import picture_metadata, save

    written = []
    for i, (picture, drawn_from) in enumerate(zip(out.images, out.seeds, strict=True)):
        metadata = picture_metadata(prompt=args.prompt, seed=drawn_from, model=pipe.digest, more=out.metadata_of(i))
        with contextlib.nullcontext(files[i]) if files else _free_name() as file:
            replaced = _made_from(file) if files and file.exists() else None
            save(picture, file, metadata=metadata)
        written.append(_Written(file, replaced))
    return written


def _made_from(file: Path) -> dict[str, Any]:
    """Return Limner's metadata in a file that is there; {} if it has none."""
    from limner.images import is_ours, read_metadata

    return read_metadata(file) if is_ours(file) else {}


@contextlib.contextmanager
def _free_name() -> Iterator[Path]:
    """Give the next limner-N.png, made as an empty file so that no other command takes it; removed if the block fails."""
    taken = [int(m[1]) for p in Path().iterdir() if (m := re.fullmatch(r"limner-(\d{1,9})\.png", p.name))]
    for number in itertools.count(max(taken, default=0) + 1):
        file = Path(f"limner-{number}.png")
        try:
            file.open("xb").close()
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"output: {file} cannot be written ({error.strerror}); give a name with -o") from error
    try:
        yield file
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _print(
    args: argparse.Namespace,
    pipe: Pipeline,
    out: PipelineOutput,
    *,
    files: list[_Written],
    names: list[str],
    repainted: ReferenceReport | None,
) -> None:
    """Print what was read and written, and what was drawn. `repainted` is the report of image 1's file, if that is."""
    size = out.metadata["width"], out.metadata["height"]
    own = out.references[0].processed_size if out.references else pipe.default_size
    over_cap = pipe.reference_policy.over_cap
    said = in_words(out.warnings, size, pipe.sizes, default=own, over_cap=over_cap, field="--size")
    warnings = [in_options(warning, options_of(args), typed=args.parser.typed) for warning in said]
    if args.json:
        result = {
            "outputs": [
                {**file.as_json(), "seed": seed, "width": picture.width, "height": picture.height}
                for file, seed, picture in zip(files, out.seeds, out.images, strict=True)
            ],
            "prompt": {"text": args.prompt, **asdict(out.prompts[0])},
            "references": [
                {"file": file, **report.as_json()} for file, report in zip(names, out.references, strict=True)
            ],
            "reference_cache": out.reference_cache,
            "warnings": warnings,
            **({"canvas": [asdict(report) for report in out.canvas]} if out.canvas else {}),
            **({"preserved": [one.describe() for one in out.preserved]} if out.preserved else {}),
            "timings": {**asdict(out.timings), "total": out.timings.total},
            "version": __version__,
            "model": pipe.digest,
            **{k: v for k, v in out.metadata.items() if k != "references"},
        }
        print(json.dumps(result))
        return
    for line in _lines(args, out, warnings, files=files, names=names, repainted=repainted):
        print(line)


def _lines(
    args: argparse.Namespace,
    out: PipelineOutput,
    warnings: list[str],
    *,
    files: list[_Written],
    names: list[str],
    repainted: ReferenceReport | None,
) -> Iterator[str]:
    """Yield the files that were read and written, with their sizes, then what was drawn where that is another size."""
    from limner.images import printable

    for number, (name, report) in enumerate(zip(names, out.references, strict=True), start=1):
        size = None if repainted is None or number > 1 else repainted.upright_size or repainted.original_size
        what = report.describe() if size is None else "{}x{}, repainted".format(*size)
        yield f"image {number}: {printable(name)}: {what}"
    if out.prompts[0].cut:
        cut = out.prompts[0]
        yield f"prompt: {cut.num_tokens} tokens, {cut.limit} are read; cut: {cut.cut!r}"
    yield from (f"warning: {warning}" for warning in warnings)
    kept = f", references from {out.reference_cache}" if out.reference_cache in ("memory", "disk", "remote") else ""
    for written, drawn_from, picture in zip(files, out.seeds, out.images, strict=True):
        shape = f"{picture.width}x{picture.height}"
        yield f"{printable(str(written.file))}: seed {drawn_from}, {shape}, {out.timings.total:.2f} s{kept}"
    yield from (printable(line) for line in (written.describe() for written in files) if line)
    yield from (one.describe() for one in out.canvas)
    yield from (one.describe() for one in out.preserved)
    if repainted is not None:
        seen = out.references[0]
        where = ", at {}, {} of what is drawn".format(*seen.origin) if any(seen.origin) else ""
        yield "image 1 as the model sees it: {}x{}".format(*seen.processed_size) + where
