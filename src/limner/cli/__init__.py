"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2.

Imports nothing heavy before a command runs; knows nothing of models beyond the pipeline's public names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from limner import __version__, ranks
from limner.config import ReferencePolicy
from limner.errors import InvalidRequest, LimnerError, MissingExtra, OutputError, RemoteError

if TYPE_CHECKING:
    from limner.batch import Batch
    from limner.config import ModelGeometry
    from limner.engine.model_options import ModelOptions
    from limner.images import PreparedReference
    from limner.memory import MemoryPlan, Staging
    from limner.pipeline import Pipeline, PipelineOutput
    from limner.references import References
    from limner.store import ReferenceStore

__all__ = ["build_parser", "main"]

DTYPES = ("float32", "bfloat16", "float16")
ENGINES = ("standard", "diffusers_kv", "cold", "warm", "int8_cold", "int8_warm", "warm_int8_kv")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if not ranks.speaks():
            ranks.exit_silently()
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
    edit.add_argument("-i", "--image", action="append", metavar="FILE", help="a reference; again for image 2, 3, ...")
    edit.add_argument("--references", metavar="PACK", help="a pack of references (limner refs pack) instead of -i")
    _store_argument(edit, help="where K/V of references are kept for later runs")
    _budget_argument(edit)
    _kv_argument(edit)
    _reference_arguments(edit)
    edit.set_defaults(run=_draw)

    generate = commands.add_parser("generate", help="draw from text alone", description="Draw from text alone.")
    _drawing_arguments(generate)
    generate.add_argument("-i", "--image", action="append", help=argparse.SUPPRESS)  # refused with the remedy
    generate.set_defaults(
        run=_draw,
        references=None,
        store=None,
        store_cache=None,
        store_bytes=None,
        kv_cache_dtype=None,
        background=None,
        max_pixels=None,
    )

    batch = commands.add_parser(
        "batch",
        help="draw all rows of a manifest; goes on where it was stopped",
        description="Draw all rows of a manifest; run again, it goes on where it was stopped. Exit code 1 if a row failed.",
    )
    _batch_arguments(batch)

    quantize = commands.add_parser(
        "quantize", help="write a model folder with an int8 transformer", description="Quantize a model once, to int8."
    )
    quantize.add_argument("model", metavar="MODEL", help="folder or hub id")
    quantize.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; has to be new")
    quantize.add_argument("--dtype", choices=DTYPES, help="of what is not int8; default: that of the files")
    quantize.add_argument("--json", action="store_true", help="print one JSON object")
    quantize.set_defaults(run=_quantize)

    inspect = commands.add_parser(
        "inspect",
        help="what a file or folder of weights is, and what is missing from it",
        description="Layout, geometry, dtypes, bytes and digests of weights, and what is missing; exit code 1 if damaged.",
    )
    inspect.add_argument(
        "source", metavar="FILE", help="weights: a file of any layout, a part's folder, a model's folder"
    )
    inspect.add_argument(
        "--verify", action="store_true", help="load every tensor, look for NaN, give the weights' digest"
    )
    inspect.add_argument("--no-digest", action="store_true", help="headers alone: do not read the bytes of the files")
    _part_arguments(inspect)
    inspect.set_defaults(run=_inspect_weights)

    convert = commands.add_parser(
        "convert",
        help="write weights in another layout",
        description="Write a model, or a part of one, in another layout. Nothing is written over.",
    )
    convert.add_argument("source", metavar="SOURCE", help="a file of any layout, a part's folder, a model's folder")
    convert.add_argument(
        "-o", "--output", required=True, metavar="TARGET", help="folder or file to write; has to be new"
    )
    convert.add_argument("--to", required=True, choices=("diffusers", "int8", "original"), help="layout to write")
    convert.add_argument("--dtype", choices=DTYPES, help="of what is not int8; default: that of the files")
    _part_arguments(convert)
    convert.set_defaults(run=_convert)

    verify = commands.add_parser(
        "verify",
        help="say where pictures come from: metadata and C2PA manifest",
        description="Read the metadata and check the C2PA manifest of pictures; exit code 1 if one is broken.",
    )
    verify.add_argument("file", nargs="+", metavar="FILE", help="pictures: PNG, JPEG or WebP")
    verify.add_argument("--trust", metavar="PEM", help="root certificates that vouch for signers")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify_pictures)

    plan = commands.add_parser(
        "plan",
        help="how much memory a request takes, and the cheapest setting that fits",
        description="The budget of memory of a request, by component and phase, without loading or computing anything.",
    )
    _plan_arguments(plan)

    bench = commands.add_parser(
        "bench",
        help="measure a 4-step edit beside diffusers",
        description="Measure a 4-step edit beside diffusers: the same random weights, one run, medians.",
    )
    _bench_arguments(bench)

    serve = commands.add_parser(
        "serve",
        help="serve the model over HTTP: two API dialects, references as handles, a page",
        description="Serve the model over HTTP: two API dialects, references as handles, a page at /.",
    )
    _serve_arguments(serve)

    deploy = commands.add_parser(
        "deploy",
        help="serve the model over HTTP by many processes, on Ray Serve",
        description="Serve the model as limner serve does, by replicas on Ray Serve. Needs limner[ray,serve].",
    )
    _deploy_arguments(deploy)

    refs = commands.add_parser("refs", help="K/V of references: packs and stores", description="K/V of references.")
    _refs_parser(refs)
    return parser


def _part_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", choices=("transformer", "vae", "text_encoder"), help="which part, where there are several"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="model folder whose configurations say what a single file does not"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="klein-9b, klein-4b, a folder or hub id; default: the bundled one"
    )
    parser.add_argument("--references", type=int, default=0, metavar="N", help="number of references (default: 0)")
    parser.add_argument("--reference-size", type=_size, default=(1024, 1024), metavar="WxH", help="of each (1024x1024)")
    parser.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH", help="of the output (1024x1024)")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument("--text", type=int, default=512, metavar="N", help="text tokens (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="arithmetic (default: bfloat16)")
    parser.add_argument("--quantize", choices=("int8",), help="a model that limner quantize wrote")
    _kv_argument(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    parser.add_argument(
        "--memory", metavar="SIZE", help="what there is, as 24GiB: finds the cheapest setting that fits"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_plan)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--references", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="numbers of references"
    )
    parser.add_argument("--side", type=int, default=512, metavar="PX", help="side of the output (default: 512)")
    parser.add_argument("--reference-side", type=int, default=512, metavar="PX", help="side of a reference (512)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once")
    parser.add_argument("--text", type=int, default=512, metavar="N", help="text tokens (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds; medians are taken (default: 3)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES[:-1]), help="what to measure")
    parser.add_argument(
        "--geometry",
        nargs=3,
        type=int,
        default=[8, 2, 6],
        metavar=("HEADS", "DOUBLE", "SINGLE"),
        help="heads of 128, double- and single-stream blocks (default: 8 2 6)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--kernel", help="attention kernel of Limner; default: the device's")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the JSON here, and the table beside it as .md")
    parser.set_defaults(run=_bench)


def _batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "manifest",
        metavar="MANIFEST",
        help='JSON lines: {"id": "a", "prompt": "...", "references": ["cat.png"], "seed": 1, "size": "512x512", '
        '"steps": 4}; all but id and prompt may be left out; files are relative to the manifest',
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="folder of <id>.png and results.jsonl; made if it is not there",
    )
    parser.add_argument("--format", choices=("png", "jpeg", "webp"), default="png", help="of the pictures (png)")
    parser.add_argument(
        "--images-at-once",
        type=int,
        default=1,
        metavar="N",
        help="rows of equal references and size drawn side by side; other than 1, pictures depend on it by rounding",
    )
    _model_arguments(parser)
    _store_argument(parser, help="where K/V of references are kept beyond this batch")
    _budget_argument(parser)
    _kv_argument(parser)
    _reference_arguments(parser)
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="draw on many processes: local (this machine), auto, or HOST:PORT of a Ray cluster",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --ray: processes; default: one a core, or a GPU")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: rows, failed, prefills, images a second"
    )
    parser.set_defaults(run=_batch)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    _listen_arguments(parser)
    parser.add_argument(
        "--standby", action="store_true", help="wait with the model loaded while another server has the jobs of --data"
    )
    parser.add_argument("--new-key", metavar="NAME", help="make a key for NAME in the --keys file, print it, and exit")
    _model_arguments(parser)
    _store_argument(parser, help="where K/V of references are kept across restarts")
    _budget_argument(parser)
    _kv_argument(parser)
    _reference_arguments(parser)
    _service_arguments(parser)
    parser.set_defaults(run=_serve)


def _deploy_arguments(parser: argparse.ArgumentParser) -> None:
    _listen_arguments(parser)
    _model_arguments(parser)
    _store_argument(parser, help="where replicas share K/V of references; all nodes have to reach it")
    _budget_argument(parser)
    _kv_argument(parser)
    _reference_arguments(parser)
    scale = parser.add_argument_group("replicas")
    scale.add_argument(
        "--address",
        default="local",
        metavar="ADDRESS",
        help="local (this machine), auto, or HOST:PORT of a Ray cluster (default: local)",
    )
    scale.add_argument("--replicas", type=int, default=1, metavar="N", help="processes that draw (1)")
    scale.add_argument("--max-replicas", type=int, metavar="N", help="start more while requests wait, up to N")
    scale.add_argument(
        "--queue", type=float, default=4, metavar="N", help="requests of a replica, drawn or waiting, to scale for (4)"
    )
    scale.add_argument("--threads", type=int, metavar="N", help="cores of a replica; default: this machine's, shared")
    scale.add_argument(
        "--router",
        choices=("affine", "ray"),
        default="affine",
        help="affine: to a replica that holds the references, unless waiting costs more than a prefill; ray: Ray's own",
    )
    scale.add_argument(
        "--store-memory",
        metavar="SIZE",
        help="K/V that a replica keeps in memory, as 8GiB; default: a quarter of what is free, shared",
    )
    _service_arguments(parser)
    parser.set_defaults(run=_deploy)


def _listen_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8731, metavar="N", help="port (default: 8731)")
    parser.add_argument(
        "--data",
        metavar="DIR|URL",
        help="folder of jobs and results, or postgresql://HOST/DATABASE (default: ~/.local/share/limner/serve)",
    )
    parser.add_argument("--keys", metavar="FILE", help="API keys, hashed; or $LIMNER_KEYS; without keys: loopback only")


def _service_arguments(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-waiting", type=int, default=256, metavar="N", help="requests that may wait (256)")
    limits.add_argument("--max-batch", type=int, default=10, metavar="N", help="images drawn at once (10)")
    limits.add_argument("--images-per-key", type=int, metavar="N", help="images a key may have in all (no limit)")
    limits.add_argument("--requests-per-minute", type=float, default=600, metavar="N", help="of one key (600)")
    limits.add_argument("--concurrent", type=int, default=24, metavar="N", help="unfinished jobs of one key (24)")
    limits.add_argument("--keep-results", type=float, default=600, metavar="S", help="seconds (600)")
    limits.add_argument("--drain", type=float, default=30, metavar="S", help="seconds a shutdown waits for jobs (30)")
    reach = parser.add_argument_group("reach")
    reach.add_argument("--public-url", metavar="URL", help="what callers reach the server under, for URLs in answers")
    reach.add_argument("--tls-certificate", metavar="FILE", help="PEM chain; serves https")
    reach.add_argument("--tls-key", metavar="FILE", help="PEM key")
    reach.add_argument("--fetch-urls", action="store_true", help="fetch pictures that are named by https URL")
    reach.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin that webhooks and fetches may reach although it is not public, as http://127.0.0.1:9000",
    )
    safe = parser.add_argument_group("safety and provenance")
    safe.add_argument("--unsafe-no-checks", action="store_true", help="check neither prompts nor pictures")
    safe.add_argument("--terms", metavar="FILE", help="more terms that prompts may not have, one a line")
    safe.add_argument("--c2pa-certificate", metavar="FILE", help="sign results: PEM chain")
    safe.add_argument("--c2pa-key", metavar="FILE", help="sign results: PEM key")
    safe.add_argument(
        "--c2pa-development", action="store_true", help="sign with a certificate made here, marked as such"
    )
    parser.add_argument("--log", choices=("json", "text"), default="json", help="form of the log on stderr")


def _refs_parser(refs: argparse.ArgumentParser) -> None:
    commands = refs.add_subparsers(dest="refs_command", metavar="COMMAND", required=True, parser_class=_Parser)

    def add(name: str, summary: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        parser.set_defaults(run=run)
        return parser

    inspect = add("inspect", "what becomes of pictures as references (in this order), or what a pack holds", _inspect)
    inspect.add_argument("file", nargs="+", metavar="FILE", help="pictures, or one pack (.safetensors)")
    inspect.add_argument("--model", metavar="MODEL", help="folder or hub id; default: the bundled model")
    _reference_arguments(inspect)

    pack = add("pack", "compute the K/V of pictures (in this order) and write them to a pack", _pack)
    pack.add_argument("file", nargs="+", metavar="FILE", help="pictures: image 1, 2, ...")
    pack.add_argument("-o", "--output", required=True, metavar="PACK", help="file to write, .safetensors")
    warm = add("warm", "compute the K/V of pictures (in this order) and keep them in a store", _warm)
    warm.add_argument("file", nargs="+", metavar="FILE", help="pictures: image 1, 2, ...")
    _store_argument(warm)
    _budget_argument(warm)
    warm.add_argument("--pin", action="store_true", help="keep them from eviction")
    for parser in (pack, warm):
        _model_arguments(parser)
        _kv_argument(parser)
        _reference_arguments(parser)

    ls = add("ls", "list what a store holds, the least recently used first", _ls)
    _store_argument(ls)
    rm = add("rm", "remove entries of a store", _rm)
    rm.add_argument("key", nargs="+", metavar="KEY", help="content keys, or their first 8 or more digits")
    _store_argument(rm)
    _cache_argument(rm)
    verify = add("verify", "read packs, or every entry of a store; exit code 1 if one is damaged", _verify)
    verify.add_argument("file", nargs="*", metavar="PACK", help="packs; default: those of the store")
    _store_argument(verify)
    for parser in (inspect, pack, warm, ls, rm, verify):
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def _store_argument(parser: argparse.ArgumentParser, help: str = "the store") -> None:  # noqa: A002
    parser.add_argument(
        "--store",
        metavar="STORE",
        default=os.environ.get("LIMNER_STORE"),
        help=f"{help}: a folder, or a URL such as s3://bucket/prefix (default: $LIMNER_STORE)",
    )


def _cache_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store-cache",
        metavar="DIR",
        help="with a URL as the store: folder of this machine for what was fetched and made",
    )


def _budget_argument(parser: argparse.ArgumentParser) -> None:
    """Of the folder of the store, which with a URL is that of its copies."""
    _cache_argument(parser)
    parser.add_argument(
        "--store-bytes",
        type=int,
        metavar="N",
        help="remove what was used least recently from the folder when it has more bytes; default: remove nothing",
    )


def _kv_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache-dtype", choices=("int8", "fp8"), help="keep K/V of references in half the bytes of bfloat16"
    )


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
    _model_arguments(parser)
    parser.add_argument(
        "--parallel",
        choices=("tensor", "sequence"),
        help="under torchrun: what is divided among its processes, heads and MLP (tensor, the default) or tokens",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: files, seeds, sizes, timings")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    """What a pipeline is loaded from, and how it computes."""
    parser.add_argument("--model", metavar="MODEL", help="folder or hub id; default: the bundled model")
    for name in ("transformer", "vae", "text-encoder"):
        parser.add_argument(f"--{name}", metavar="FILE", help="file or folder to take this part from instead")
    parser.add_argument("--dtype", choices=DTYPES, help="arithmetic; default: that of the files")
    parser.add_argument("--quantize", choices=("int8",), help="make the transformer's weights and activations int8")
    parser.add_argument(
        "--lora",
        action="append",
        type=_lora,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA: file, folder or hub id, and its strength (default: 1); again for more",
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="what may be resident, as 20GiB: weights are in memory by turns (CPU, Linux; see limner plan)",
    )


def _reference_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--background", metavar="COLOUR", help="what stands behind transparent references, as white or #fff"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="scale larger references down to N pixels (what the model says, else 1048576)",
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as 512x512")
    return int(match[1]), int(match[2])


def _lora(text: str) -> tuple[str, float]:
    """A file and a strength; a file whose name has a colon is taken as it is."""
    file, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not file or not math.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"{text!r}: strength {strength!r} is not a finite number; give FILE or FILE:STRENGTH, as style.safetensors:0.8"
        )
    return file, value


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code."""
    with contextlib.ExitStack() as stack:
        if not ranks.speaks():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int | None] = args.run
    try:
        if ranks.started() and run is not _draw:
            _refuse_several(args.command)
        code = run(args)
    except LimnerError as error:
        print(f"limner: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("limner: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _refuse_several(command: str) -> NoReturn:
    """Refuses a command that torchrun started several times."""
    if not ranks.speaks():
        ranks.exit_silently()
    raise InvalidRequest(
        command,
        f"runs in one process, and torchrun started {os.environ['WORLD_SIZE']}; start it without torchrun (edit and "
        "generate run under it)",
    )


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
    """Pictures are prepared before the model is loaded; what a folder at hand says of them is read."""
    policy = ReferencePolicy(background=args.background, max_pixels=args.max_pixels)
    if args.max_pixels is None and (args.model is None or Path(args.model).is_dir()):
        from limner.weights.folder import PARTS, read_settings, resolve_model

        folder = resolve_model(args.model, without=PARTS)
        return policy.for_model(read_settings(folder).max_reference_pixels)
    return policy


def _prepare(args: argparse.Namespace, files: Sequence[str]) -> list[PreparedReference]:
    """The references of a command, or the error that names the one that cannot be used."""
    if not files:
        return []
    from limner.images import prepare_reference

    policy = _policy(args)
    return [prepare_reference(file, policy=policy, field=f"image {i}") for i, file in enumerate(files, start=1)]


def _model_options(args: argparse.Namespace) -> ModelOptions:
    from limner.engine.model_options import ModelOptions

    return ModelOptions(
        model=args.model,
        transformer=args.transformer,
        vae=args.vae,
        text_encoder=args.text_encoder,
        dtype=args.dtype,
        quantize=args.quantize,
        device=args.device,
        kv_cache_dtype=args.kv_cache_dtype,
        memory_limit=args.memory_limit,
        policy=_policy(args),
        loras=tuple(args.lora),
        parallel=getattr(args, "parallel", None),
    )


class _Progress:
    """One bar over load, text, references, steps and decode; silent unless stderr is a terminal."""

    def __init__(self, *, num_steps: int, references: bool, silent: bool = False) -> None:
        from tqdm import tqdm

        self._weights = {"load": 3, "text": 1, "references": 1 if references else 0, "step": num_steps, "decode": 1}
        self._bar = tqdm(total=sum(self._weights.values()), disable=silent or not sys.stderr.isatty(), leave=False)

    def __call__(self, part: str, done: int, of: int) -> None:
        names = list(self._weights)
        before = sum(self._weights[name] for name in names[: names.index(part)])
        self._bar.set_description(part)
        self._bar.n = before + self._weights[part] * done // max(of, 1)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _draw(args: argparse.Namespace) -> None:
    if not ranks.started():
        if args.parallel is not None:
            raise InvalidRequest(
                "--parallel",
                f"{args.parallel} needs several processes; start them with torchrun --nproc-per-node 2 -m limner "
                f"{args.command} ..., or leave it out",
            )
        _draw_here(args, writes=True)
        return
    args.parallel = args.parallel or "tensor"
    with ranks.together(args.device) as writes:
        _draw_here(args, writes=writes)


def _draw_here(args: argparse.Namespace, *, writes: bool) -> None:
    """Draws; `writes` and prints unless another process of a parallel model does."""
    files = _output_files(args.output, args.num_images) if writes else []
    if args.steps < 1:
        raise InvalidRequest("--steps", f"{args.steps} is not a number of steps; use 1 or more")

    if not args.prompt.strip():
        raise InvalidRequest("prompt", f"{args.prompt!r} is empty; say what to draw or to change")
    if args.command == "edit" and bool(args.image) == bool(args.references):
        raise InvalidRequest(
            "--image",
            "give either pictures (-i FILE, again for more) or one pack (--references PACK); without references: "
            "limner generate",
        )
    if args.command == "generate" and args.image:
        raise InvalidRequest("--image", "generate draws without references; with them: limner edit PROMPT -i FILE")
    for name in ("background", "max_pixels", "store", "store_cache", "kv_cache_dtype"):
        if args.references and getattr(args, name) is not None:
            raise InvalidRequest(
                f"--{name.replace('_', '-')}", "a pack is used as it is; leave this out, or give pictures (-i FILE)"
            )
    prepared = _prepare(args, args.image or [])  # bad ones are refused before a model is loaded
    model = _model_options(args)
    model.check()

    import torch

    from limner.images import save
    from limner.references import References

    pack = References.load(args.references) if args.references else None
    store = _optional_store(args)
    progress = _Progress(num_steps=args.steps, references=bool(prepared), silent=not writes)
    try:
        pipe = model.load(store=store, progress=progress)
        generators = None
        if args.seed is not None:
            generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
        width, height = args.size or (None, None)
        out = pipe(
            args.prompt,
            image=prepared or None,
            references=pack,
            width=width,
            height=height,
            num_inference_steps=args.steps,
            num_images_per_prompt=args.num_images,
            generator=generators,
            output_type="pil" if writes else "latent",
            return_dict=True,
            progress=progress,
        )
    finally:
        progress.close()
    assert not isinstance(out, tuple)
    if not writes:
        if store is not None:
            store.flush()
        return
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
    if store is not None:
        store.flush()
    _print_result(args, pipe, out, files)


def _print_result(args: argparse.Namespace, pipe: Pipeline, out: PipelineOutput, files: list[Path]) -> None:
    from limner.images import printable

    names = args.image or [args.references] * len(out.references)
    if args.json:
        result = {
            "outputs": [{"file": str(file), "seed": seed} for file, seed in zip(files, out.seeds, strict=True)],
            "prompt": {"text": args.prompt, **asdict(out.prompts[0])},
            "references": [
                {"file": file, **asdict(report)} for file, report in zip(names, out.references, strict=True)
            ],
            "reference_cache": out.reference_cache,
            "timings": {**asdict(out.timings), "total": out.timings.total},
            "version": __version__,
            "model": pipe.digest,
            **{k: v for k, v in out.metadata.items() if k != "references"},
        }
        print(json.dumps(result))
        return
    for number, (file, report) in enumerate(zip(names, out.references, strict=True), start=1):
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
            "quantization": refs.quantization,
            "shard": refs.shard,
            "prefill_seconds": refs.prefill_seconds,
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


def _store(args: argparse.Namespace, *, disk_bytes: int | None = None, make: bool = True) -> ReferenceStore:
    """The store of a command: its place, and no limit but an asked one that would remove what other commands kept.

    `make` makes a folder that is not there.
    """
    from limner.store import ReferenceStore

    if not args.store:
        raise InvalidRequest("--store", "no folder or URL is given; use --store STORE or set LIMNER_STORE")
    cache = getattr(args, "store_cache", None)
    return ReferenceStore.open(args.store, cache=cache, disk_bytes=disk_bytes, make=make)


def _optional_store(args: argparse.Namespace) -> ReferenceStore | None:
    """The store of a command that runs without one too."""
    if args.store:
        return _store(args, disk_bytes=args.store_bytes)
    if args.store_cache is not None:
        raise InvalidRequest("--store-cache", f"{args.store_cache} is a folder before a URL; add --store URL")
    return None


def _prefill(args: argparse.Namespace, store: ReferenceStore | None = None) -> References:
    prepared = _prepare(args, args.file)
    model = _model_options(args)
    model.check()
    return model.load(store=store).prefill(prepared)


def _describe(refs: References) -> dict[str, Any]:
    return {
        "key": refs.key,
        "num_references": len(refs.reports),
        "num_tokens": refs.num_tokens,
        "nbytes": refs.nbytes,
        "prefill_seconds": round(refs.prefill_seconds, 4),
    }


def _print(args: argparse.Namespace, found: dict[str, Any], line: str) -> None:
    print(json.dumps(found) if args.json else line)


def _pack(args: argparse.Namespace) -> None:
    path = Path(args.output)
    if path.suffix != ".safetensors":
        raise InvalidRequest("--output", f"{path.name} does not end in .safetensors; name the pack so")
    if not path.parent.is_dir():
        raise InvalidRequest("--output", f"{path.parent} is not a folder; make it first")
    refs = _prefill(args)
    refs.save(path)
    found = {"file": str(path), **_describe(refs)}
    _print(args, found, f"{path}: {len(refs.reports)} references, {refs.num_tokens} tokens, {refs.nbytes} bytes")


def _warm(args: argparse.Namespace) -> None:
    from limner.places import without_credentials

    store = _store(args, disk_bytes=args.store_bytes)
    refs = _prefill(args, store)
    store.put(refs)
    store.flush()
    if not store.outlives(refs.key):
        if (error := store.upload_error(refs.key)) is not None:
            raise RemoteError(f"--store: {error}")
        raise OutputError(
            f"--store: {without_credentials(args.store)} did not take {refs.nbytes} bytes; free some space, unpin entries, "
            "raise --store-bytes or give another place"
        )
    if args.pin:
        store.pin(refs.key)
    _print(args, _describe(refs), f"{refs.key}: {len(refs.reports)} references, {refs.num_tokens} tokens")


def _bench(args: argparse.Namespace) -> None:
    import shlex

    import torch

    from limner.bench import Bench, BenchCase, as_markdown, geometry, machine
    from limner.model.attention import KERNELS
    from limner.pipeline import check_device

    check_device(args.device)
    for name in ("references", "side", "reference_side", "batch", "text", "rounds", "geometry"):
        values = getattr(args, name)
        low = 0 if name == "references" else 1
        if any(value < low for value in (values if isinstance(values, list) else [values])):
            raise InvalidRequest(f"--{name.replace('_', '-')}", f"{values} has to be {low} or more")
    for name in ("side", "reference_side"):
        if getattr(args, name) % 16:
            raise InvalidRequest(f"--{name.replace('_', '-')}", f"{getattr(args, name)} is not a multiple of 16")
    if args.kernel is not None and args.kernel not in KERNELS:
        raise InvalidRequest("--kernel", f"{args.kernel!r} is not one of {', '.join(KERNELS)}")
    path = Path(args.output) if args.output else None
    if path is not None:  # before measuring for minutes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest("--output", f"{path.parent} cannot be made ({error.strerror})") from error
    config = geometry(*args.geometry)
    bench = Bench(config, dtype=getattr(torch, args.dtype), device=args.device)
    bench.ours.kernel = args.kernel
    cases = [
        BenchCase(
            num_references=number,
            side=args.side,
            reference_side=args.reference_side,
            batch=args.batch,
            num_text=args.text,
        )
        for number in args.references
    ]

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report: dict[str, Any] = {"benchmark": "edit", **machine(bench.device)}
    report |= {
        "dtype": args.dtype,
        "geometry": {"hidden": config.width, "double": args.geometry[1], "single": args.geometry[2]},
    }
    report["command"] = shlex.join(["limner", *sys.argv[1:]])
    report["cases"] = [bench.run(case, rounds=args.rounds, engines=args.engines, progress=progress) for case in cases]
    report["arithmetic"] = bench.ours.arithmetic
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(as_markdown(report) + "\n")
    print(as_markdown(report))
    print(json.dumps(report))


def _plan(args: argparse.Namespace) -> None:
    from limner.memory import Formats, Request, cheapest, make_plan, parse_bytes

    for name, low in (("references", 0), ("num_images", 1), ("text", 1)):
        if getattr(args, name) < low:
            raise InvalidRequest(f"--{name.replace('_', '-')}", f"{getattr(args, name)} has to be {low} or more")
    for name in ("size", "reference_size"):
        if any(side < 64 or side % 16 for side in getattr(args, name)):
            shown = "x".join(map(str, getattr(args, name)))
            raise InvalidRequest(
                f"--{name.replace('_', '-')}", f"{shown}: sides have to be multiples of 16, at least 64"
            )
    limit = None if args.memory is None else parse_bytes(args.memory, field="--memory")
    geometry, int8 = _geometry(args.model)
    packed = False
    if args.device == "cpu":
        from limner.model.int8 import has_int8_products

        packed = has_int8_products()
    formats = Formats(
        itemsize=4 if args.dtype == "float32" else 2,
        quantize="int8" if int8 else args.quantize,
        kv=args.kv_cache_dtype,
        packed=packed,
    )
    request = Request(
        size=args.size, references=(args.reference_size,) * args.references, batch=args.num_images, num_text=args.text
    )
    if limit is not None:
        plan = cheapest(geometry, request, formats=formats, limit=limit, device=args.device, field="--memory")
    else:
        plan = make_plan(geometry, request, formats=formats, device=args.device)
    stagings: tuple[Staging, ...] = ("whole", "parts", "layers") if args.device == "cpu" else ("whole",)
    peaks = {
        how: make_plan(geometry, request, formats=plan.formats, device=args.device, staging=how, limit=0).peak
        for how in stagings
    }
    found = {"model": args.model or "bundled", **plan.as_json(), "peaks": peaks, "options": _plan_options(args, plan)}
    _print(args, found, "\n".join(_plan_lines(found)))


def _geometry(model: str | None) -> tuple[ModelGeometry, bool]:
    """Geometry by name or from a folder's configurations, and whether its transformer is int8."""
    from limner.config import MODELS, AutoencoderConfig, ModelGeometry, TextConfig, TransformerConfig

    if model is not None and model.lower() in MODELS:
        return MODELS[model.lower()], False
    from limner.weights.folder import read_json, resolve_model

    folder = resolve_model(model)
    configs = {part: read_json(folder / part / "config.json") for part in ("transformer", "text_encoder", "vae")}
    geometry = ModelGeometry(
        transformer=TransformerConfig.from_diffusers(configs["transformer"]),
        text_encoder=TextConfig.from_transformers(configs["text_encoder"]),
        autoencoder=AutoencoderConfig.from_diffusers(configs["vae"]),
    )
    return geometry, "quantization_config" in configs["transformer"]


def _plan_options(args: argparse.Namespace, plan: MemoryPlan) -> str:
    """The options of `limner edit` that a plan stands for."""
    options = []
    if plan.staging != "whole" and args.memory is not None:
        options.append(f"--memory-limit {args.memory}")
    if plan.formats.kv:
        options.append(f"--kv-cache-dtype {plan.formats.kv}")
    if plan.formats.quantize:
        options.append("--model FOLDER, one that limner quantize wrote")
    return " ".join(options)


def _plan_lines(found: dict[str, Any]) -> list[str]:
    def gib(number: int) -> str:
        return f"{number / 2**30:9.2f}"

    lines = [f"{found['model']} on {found['device']}, GiB", ""]
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


def _serve(args: argparse.Namespace) -> None:
    from limner.server.run import ServeOptions, add_key, check_options, default_data, serve

    if args.new_key is not None:
        if args.keys is None:
            raise InvalidRequest("--new-key", "needs --keys FILE, to which its hash is added")
        print(add_key(args.new_key, file=args.keys))
        return
    if not 0 <= args.port <= 65535:
        raise InvalidRequest("--port", f"{args.port} is not within 0 to 65535")
    options = ServeOptions(
        host=args.host,
        port=args.port,
        data=args.data or default_data(),
        keys=args.keys,
        standby=args.standby,
        unsafe=args.unsafe_no_checks,
        terms=args.terms,
        certificate=args.c2pa_certificate,
        private_key=args.c2pa_key,
        development_certificate=args.c2pa_development,
        fetch_urls=args.fetch_urls,
        allow_origins=tuple(args.allow_origin),
        requests_per_minute=args.requests_per_minute,
        concurrent=args.concurrent,
        max_waiting=args.max_waiting,
        max_batch=args.max_batch,
        images_per_key=args.images_per_key,
        keep_results=args.keep_results,
        drain=args.drain,
        public_url=args.public_url,
        tls_certificate=args.tls_certificate,
        tls_key=args.tls_key,
        log=args.log,
    )
    check_options(options)
    model = _model_options(args)
    model.check()
    store = _optional_store(args)
    name = "limner-stickers" if args.model is None else Path(args.model).name
    serve(lambda: model.load(store=store), options, model_name=name)


def _deploy(args: argparse.Namespace) -> None:
    if not 0 < args.port <= 65535:
        raise InvalidRequest("--port", f"{args.port} is not within 1 to 65535")
    try:
        from limner.deploy.ray import DeployOptions, deploy
    except ImportError as error:
        package = (error.name or "ray").partition(".")[0]
        raise MissingExtra("limner deploy", package=package, extra="ray,serve") from error

    renamed = {"lora": "loras", "allow_origin": "allow_origins"}
    own = {"command", "run", "host", "port", "address", "tls_certificate", "tls_key"}
    options = DeployOptions.parse({renamed.get(n, n): value for n, value in vars(args).items() if n not in own})

    def ready(url: str) -> None:
        print(f"limner: {options.model_name} at {url}, {args.replicas} replicas", file=sys.stderr, flush=True)

    deploy(
        options,
        address=args.address,
        host=args.host,
        port=args.port,
        certificate=args.tls_certificate,
        key=args.tls_key,
        ready=ready,
    )


class _BatchProgress:
    """A bar over rows on a terminal, a line now and then elsewhere."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._bar: Any = None
        self._start = self._told = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, of: int, failed: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=of, initial=done, unit="row", leave=False)
            self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif now - self._told >= self.SECONDS:
            self._told = now
            rate = (done - self._first) / max(now - self._start, 1e-6)
            print(f"limner: {done} of {of} rows, {failed} failed, {rate:.2f} a second", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def _says_how_to_go_on(batch: Batch) -> Iterator[None]:
    try:
        yield
    except (OutputError, RemoteError) as error:
        kept = f"{batch.num_done} of {len(batch.rows)} rows are done and kept"
        raise type(error)(f"{error}; {kept}: mend that and run the same command again") from error


def _batch(args: argparse.Namespace) -> int:
    from limner.batch import Batch, BatchOptions
    from limner.images import printable
    from limner.pipeline import check_device
    from limner.places import absolute

    if args.workers is not None and args.ray is None:
        raise InvalidRequest("--workers", f"{args.workers} processes are Ray's; add --ray")
    options = BatchOptions(
        manifest=Path(args.manifest),
        folder=Path(args.output),
        format=args.format,
        images_at_once=args.images_at_once,
        store=absolute(args.store) if args.store else None,
        store_bytes=args.store_bytes,
        store_cache=Path(os.path.abspath(args.store_cache)) if args.store_cache else None,
    )
    model = _model_options(args)
    model.check()
    progress = _BatchProgress()
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        batch = stack.enter_context(Batch(options, progress=progress))
        if args.ray is None:
            check_device(args.device)
            stack.enter_context(_says_how_to_go_on(batch))
            pipe = model.load(store=batch.store)
            batch.draw(pipe, batch.plan(pipe))
        else:
            from limner.deploy.ray_batch import Cluster

            cluster = stack.enter_context(Cluster(args.ray, workers=args.workers))
            cluster.check(batch.options)
            stack.enter_context(_says_how_to_go_on(batch))
            # what rows are and which are done depends on the weights, not on where they are
            groups = batch.plan(replace(model, device="cpu").load(store=batch.store))
            cluster.draw(batch, groups, model)
        summary = batch.finish()
    for failure in batch.failures[:10]:
        name = f" ({failure['id']})" if failure["id"] else ""
        print(printable(f"limner: line {failure['line']}{name}: {failure['error']['message']}"), file=sys.stderr)
    if len(batch.failures) > 10:
        print(f"limner: {len(batch.failures) - 10} more failed; see {summary.results}", file=sys.stderr)
    _print(args, asdict(summary), summary.describe())
    return int(summary.failed > 0)


def _quantize(args: argparse.Namespace) -> None:
    import torch

    from limner.weights.convert import convert
    from limner.weights.folder import resolve_model

    source, target = resolve_model(args.model), Path(args.output)
    if target.exists():
        raise InvalidRequest("--output", f"{target} is there already; give a new folder")
    convert(source, target, to="int8", dtype=getattr(torch, args.dtype) if args.dtype else None)
    file = target / "transformer" / "diffusion_pytorch_model.safetensors"
    _print(args, {"folder": str(target), "nbytes": file.stat().st_size}, f"{target}: {file.stat().st_size} bytes")


def _inspect_weights(args: argparse.Namespace) -> int:
    from limner.images import printable
    from limner.weights.folder import resolve_model
    from limner.weights.inspect import inspect

    source = Path(args.source)
    if not source.exists():
        source = resolve_model(args.source)
    report = inspect(
        source,
        like=resolve_model(args.model) if args.model else None,
        part=args.part,
        digests=not args.no_digest,
        verify=args.verify,
    )
    _print(args, report.as_json(), "\n".join(printable(line) for line in report.lines()))
    return int(not report.whole)


def _convert(args: argparse.Namespace) -> None:
    import torch

    from limner.weights.convert import convert
    from limner.weights.folder import resolve_model

    source, target = Path(args.source), Path(args.output)
    if not source.exists():
        source = resolve_model(args.source)
    nbytes = convert(
        source,
        target,
        to=args.to,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        part=args.part,
        like=resolve_model(args.model) if args.model else None,
    )
    _print(args, {"output": str(target), "layout": args.to, "nbytes": nbytes}, f"{target}: {nbytes} bytes of weights")


def _ls(args: argparse.Namespace) -> None:
    entries = list(_store(args, make=False).entries())
    if args.json:
        print(json.dumps({"entries": [asdict(entry) for entry in entries]}))
        return
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        holds = f"{entry.num_references} references  {entry.num_tokens} tokens" if not entry.problem else "damaged"
        what = "written" if entry.tier == "remote" else "used"
        print(f"{entry.key}  {holds}  {entry.nbytes} bytes  {what} {when}" + ("  pinned" if entry.pinned else ""))


def _rm(args: argparse.Namespace) -> None:
    from limner.places import without_credentials

    store = _store(args, make=False)
    keys = store.keys()
    chosen = []
    for prefix in args.key:
        found = [key for key in keys if key.startswith(prefix)] if len(prefix) >= 8 else []
        if len(found) != 1:
            raise InvalidRequest(
                "KEY",
                f"{prefix!r} is the start of {len(found)} keys in {without_credentials(args.store)}; give 8 digits or more "
                "of one",
            )
        chosen += found
    for key in chosen:
        store.remove(key)
    _print(args, {"removed": chosen}, "\n".join(f"removed {key}" for key in chosen))


def _verify(args: argparse.Namespace) -> int:
    from limner.references import References

    found: dict[str, str | None] = {}
    if args.file:
        for file in args.file:
            try:
                References.load(file)
                found[file] = None
            except InvalidRequest as error:
                found[file] = str(error)
    else:
        found = _store(args, make=False).verify()
    lines = [f"{name}: {'whole' if problem is None else problem}" for name, problem in found.items()]
    _print(args, {"files": found}, "\n".join(lines) or "nothing to verify")
    return int(any(found.values()))


def _verify_pictures(args: argparse.Namespace) -> int:
    from limner.images import printable
    from limner.trust.provenance import read

    try:
        trust = Path(args.trust).read_bytes() if args.trust else None
    except (OSError, ValueError) as error:
        raise InvalidRequest("--trust", f"{args.trust} cannot be read ({error}); give a PEM file") from None
    code, found = 0, []
    for file in args.file:
        try:
            report = read(file, trust=trust)
        except InvalidRequest as error:  # the others are looked at all the same
            print(f"limner: {' '.join(str(error).split())}", file=sys.stderr)
            found.append({"file": file, "error": str(error)})
            code = 2
            continue
        found.append({"file": file, "whole": report.whole, **asdict(report)})
        code = max(code, int(not report.whole))
        if not args.json:
            print("\n  ".join([f"{printable(file)}:", *report.describe()]))
    if args.json:
        print(json.dumps({"files": found}))
    return code
