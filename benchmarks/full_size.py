"""Models of full size on one machine: random checkpoints of klein's geometry, run under a memory limit.

Builds folders in the diffusers layout (shards, written with one tensor in memory; text encoder layers up to the last one
that is read), runs `limner edit` on them in a process of its own while its memory is watched, and compares with what
`limner.memory` planned; times klein-4B against diffusers. The last line is one JSON object; `-o` merges it into a file, so
that stages may be run one by one.

    .venv/bin/python benchmarks/full_size.py --folder /tmp/full --keep --only 9b-bf16 -o benchmarks/results/full_size.json

With `--baseline COMMIT --rounds 3` the edits run with that commit's source too, in turn, on the same folder:

    .venv/bin/python benchmarks/full_size.py --only 9b-int8 --quantize-text --limit 20GiB \
        --baseline 398d915 --rounds 3 --keep

Stages: 9b-bf16 and 9b-int8 (256x256, two references of 256x256, 4 steps), 9b-load (from a warm page cache to the first
step), 4b-256 and 4b-512 (denoising of 4 steps with one reference of the output's size, against diffusers).
Peaks are of /proc/PID/status: RssAnon, RssFile, and the high-water mark VmHWM.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner.bench import Bench, BenchCase, machine
from limner.bench.models import TINY, RandomValues, autoencoder_config, text_config
from limner.config import KLEIN_4B, MODELS, ModelGeometry, TransformerConfig
from limner.memory import Formats, Request, make_plan, parse_bytes
from limner.model.int8 import packs_weights, tile_threads
from limner.weights.files import TensorInfo, write_tensors
from limner.weights.folder import bundled_model, load_transformer
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer

STAGES = ("9b-bf16", "9b-int8", "9b-load", "4b-256", "4b-512")
SHARD = 5_000_000_000


def write_network(network: nn.Module, folder: Path, stem: str, config: Mapping[str, Any], values: RandomValues) -> None:
    """A network on the meta device as a folder with config.json and shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, tensor in network.state_dict().items():
        nbytes = 2 * tensor.numel()
        if filled + nbytes > SHARD and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.shape
        filled += nbytes
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        infos = {n: TensorInfo(dtype="BF16", shape=tuple(s), nbytes=2 * s.numel()) for n, s in shapes.items()}
        write_tensors(folder / file, infos, _drawn(shapes, values), metadata={})
        weight_map |= dict.fromkeys(shapes, file)
        print(f"{folder / file}", file=sys.stderr, flush=True)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _drawn(shapes: Mapping[str, torch.Size], values: RandomValues) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, values.of(name, shape)


def build(geometry: ModelGeometry, folder: Path, *, num_text: int) -> Path:
    """Return a model folder with random weights; an existing one is used as it is."""
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    values, text = RandomValues(), geometry.text_encoder
    transformer = empty_transformer(geometry.transformer, int8=False, where=folder)
    write_network(
        transformer, folder / "transformer", "diffusion_pytorch_model", geometry.transformer.to_diffusers(), values
    )
    qwen = text_config(text)
    network = empty_text_network(qwen, used=text.num_used, depth=text.num_layers, where=folder)
    write_network(network, folder / "text_encoder", "model", qwen, values)
    config = autoencoder_config(geometry.autoencoder)
    write_network(empty_autoencoder(config, where=folder), folder / "vae", "diffusion_pytorch_model", config, values)
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(bundled_model() / name, folder / name)
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": num_text}))
    shutil.copy(bundled_model() / "model_index.json", folder / "model_index.json")
    return folder


def watched(command: list[str], *, cache: Path, source: Path | None = None) -> dict[str, Any]:
    """Run a program to its end; return its last line of output, its seconds and the peaks of its memory.

    `source` is the checkout whose `limner` it imports; None: the one that this program imports.
    """
    peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0, "VmHWM": 0}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"LIMNER_CACHE": str(cache)}
        if source is not None:
            environment["PYTHONPATH"] = str(source / "src")
        process = subprocess.Popen(command, stdout=output, env=environment)
        while process.poll() is None:
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    name, _, rest = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(rest.split()[0]) << 10)
            except OSError:
                pass
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode or not lines:
        raise SystemExit(f"{shlex.join(command)}: exit code {process.returncode}")
    found: dict[str, Any] = {"seconds": round(seconds, 2), "peak_bytes": max(peaks["VmHWM"], peaks["VmRSS"])}
    found |= {"peak_anonymous_bytes": peaks["RssAnon"], "peak_file_bytes": peaks["RssFile"]}
    found["output"] = json.loads(lines[-1])
    return found


def edit(
    args: argparse.Namespace,
    geometry: ModelGeometry,
    model: Path,
    *,
    int8: Path | None = None,
    text: Path | None = None,
) -> dict[str, Any]:
    """Run the target's edit in processes of its own; return its measures and the plan.

    `int8` and `text` are an int8 transformer and text encoder. With a baseline its source runs the same edit, in turn,
    with the model's own text encoder; "ratio" is its median over this source's.
    """
    side = args.side
    limit = args.limit or ("14GiB" if int8 else "20GiB")
    sources = {"baseline": baseline(args), "ours": Path(__file__).parents[1]} if args.baseline else {"ours": None}
    if args.baseline and not baseline(args).exists():
        git("worktree", "add", "--quiet", "--detach", str(baseline(args)), args.baseline)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for number in range(args.rounds):
        for name, source in sources.items():
            command = edit_command(args, model, int8=int8, text=text if name == "ours" else None, limit=limit)
            with tempfile.TemporaryDirectory() as cache:  # digests are computed, as in a first run
                runs[name].append(watched(command, cache=Path(cache), source=source))
            print(f"round {number + 1}: {name} {runs[name][-1]['seconds']} s", file=sys.stderr, flush=True)
    found = middle(runs["ours"])
    if args.baseline:
        before = middle(runs["baseline"])
        found |= {"baseline": {"commit": args.baseline, **before}}
        found["ratio"] = round(before["seconds"] / found["seconds"], 3)
    found["memory_limit"] = limit
    formats = Formats(
        quantize="int8" if int8 else None,
        quantize_text=text is not None,
        packed=packs_weights(),
        tile_threads=tile_threads(),
    )
    request = Request(size=(side, side), references=((side, side),) * 2, num_text=args.text)
    plans = [
        make_plan(geometry, request, formats=formats, staging=staging, limit=parse_bytes(limit))
        for staging in ("whole", "parts", "layers")
    ]
    plan = next((p for p in plans if p.peak <= parse_bytes(limit)), plans[-1])
    found |= {"planned_staging": plan.staging, "planned_peak_bytes": plan.peak}
    found["planned_anonymous_bytes"] = plan.peak_anonymous
    found["planned_over_measured"] = round(plan.peak / found["peak_bytes"], 3)
    return found


def edit_command(
    args: argparse.Namespace, model: Path, *, int8: Path | None, text: Path | None, limit: str
) -> list[str]:
    """Return `limner edit` with two references, which are written here."""
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    command = [sys.executable, "-m", "limner", "edit", "put the first beside the second", "--seed", "1"]
    command += ["-o", str(args.folder / "out.png"), "--size", f"{args.side}x{args.side}", "--model", str(model)]
    command += ["--memory-limit", limit, "--json"]
    for i in range(2):
        noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        picture = args.folder / f"reference-{i}.png"
        Image.fromarray(noise.numpy()).resize((args.side, args.side)).save(picture)
        command += ["-i", str(picture)]
    for option, part in (("--transformer", int8), ("--text-encoder", text)):
        command += [] if part is None else [option, str(part)]
    return command


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median seconds, the seconds of all runs, the worst peaks, and the timings of a run in the middle."""
    chosen = sorted(runs, key=lambda run: float(run["seconds"]))[len(runs) // 2]
    found = {name: value for name, value in chosen.items() if name != "output"}
    found |= {name: max(run[name] for run in runs) for name in found if name.startswith("peak")}
    found["seconds"] = round(statistics.median(run["seconds"] for run in runs), 2)
    return found | {"all_seconds": [run["seconds"] for run in runs], "timings": chosen["output"]["timings"]}


def baseline(args: argparse.Namespace) -> Path:
    """Return the folder of another commit's files: a worktree of git, that `edit` makes and `main` removes."""
    return Path(args.folder).resolve() / f"baseline-{args.baseline}"


def git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"git {shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def quantized(model: Path, part: str, target: Path) -> Path:
    """A part of a folder in int8, written once."""
    if not target.exists():
        command = [sys.executable, "-m", "limner", "convert", str(model / part), "-o", str(target)]
        subprocess.run([*command, "--to", "int8", "--part", part], check=True, stdout=sys.stderr)
    return target


def load(model: Path, *, side: int, num_text: int) -> dict[str, Any]:
    """Loading a transformer to the first step, in a new process, after its files were read once."""
    for file in sorted((model / "transformer").glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(64 << 20):
                pass
    command = [sys.executable, __file__, "--load-worker", str(model), "--side", str(side), "--text", str(num_text)]
    with tempfile.TemporaryDirectory() as cache:
        found = watched(command, cache=Path(cache))
    largest = max(file.stat().st_size for file in (model / "transformer").glob("*.safetensors"))
    return {**found.pop("output"), **found, "largest_shard_bytes": largest}


def load_worker(model: Path, *, side: int, num_text: int) -> dict[str, Any]:
    """Run in the process of `load`."""
    started = time.perf_counter()
    transformer = load_transformer(model / "transformer", dtype=None, device=torch.device("cpu"))
    config, tokens = transformer.config, (side // 16) ** 2
    img, txt = torch.randn(1, tokens, config.in_channels), torch.randn(1, num_text, config.text_width)
    ids = {"img_ids": torch.zeros(tokens, 4), "txt_ids": torch.zeros(num_text, 4)}
    loaded = time.perf_counter()
    with torch.no_grad():
        velocity = transformer(img.bfloat16(), txt.bfloat16(), 1.0, **ids)
    assert torch.isfinite(velocity).all()
    return {"load_seconds": round(loaded - started, 3), "first_step_seconds": round(time.perf_counter() - loaded, 3)}


def beside_diffusers(args: argparse.Namespace, geometry: TransformerConfig, side: int) -> dict[str, Any]:
    """Return median seconds of denoising, ours and diffusers', run in turn."""
    bench = Bench(geometry, dtype=torch.bfloat16)
    case = BenchCase(num_references=1, side=side, reference_side=side, num_text=args.text)
    engines = ("standard", "diffusers_kv", "warm", "int8_warm")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = bench.run(case, rounds=args.rounds, engines=engines, progress=progress)
    found["median_seconds"] = {name: statistics.median(values) for name, values in found["all_seconds"].items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "limner-full-size", help="work here"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the folder for the next run")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages")
    parser.add_argument("--geometry", choices=("full", "small"), default="full", help="small: for tests, in seconds")
    parser.add_argument("--side", type=int, default=256, help="of output and references (256)")
    parser.add_argument("--text", type=int, default=512, help="text tokens (512)")
    parser.add_argument("--rounds", type=int, default=1, help="of edits, and of the stages beside diffusers (1)")
    parser.add_argument("--quantize-text", action="store_true", help="9b-int8: an int8 text encoder too")
    parser.add_argument("--baseline", metavar="COMMIT", help="run edits with the source of this commit too, in turn")
    parser.add_argument("--limit", help="memory limit of the edits; default: 20GiB, int8 14GiB")
    parser.add_argument("-o", "--output", type=Path, help="merge the result into this file")
    parser.add_argument("--load-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_worker is not None:
        print(json.dumps(load_worker(args.load_worker, side=args.side, num_text=args.text)))
        return
    if args.baseline:
        args.baseline = git("rev-parse", "--verify", f"{args.baseline}^{{commit}}")
    small = args.geometry == "small"
    nine, four = (TINY, TINY.transformer) if small else (MODELS["klein-9b"], KLEIN_4B)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, int8 = args.folder / f"9b-{args.geometry}", args.folder / f"9b-{args.geometry}-int8"
    result: dict[str, Any] = {"benchmark": "full_size", **machine(torch.device("cpu")), "geometry": args.geometry}
    result |= {"command": shlex.join(["benchmarks/full_size.py", *sys.argv[1:]]), "stages": {}}
    try:
        if any(stage.startswith("9b") for stage in args.only):
            build(nine, model, num_text=args.text)
        for stage in args.only:
            print(f"stage {stage}", file=sys.stderr, flush=True)
            if stage == "9b-load":
                result["stages"][stage] = load(model, side=args.side, num_text=args.text)
            elif stage.startswith("9b"):
                parts = {}
                if stage == "9b-int8":
                    parts["int8"] = quantized(model, "transformer", int8)
                    if args.quantize_text:
                        parts["text"] = quantized(model, "text_encoder", args.folder / f"{int8.name}-text")
                result["stages"][stage] = edit(args, nine, model, **parts)
            else:
                result["stages"][stage] = beside_diffusers(args, four, args.side if small else int(stage[3:]))
            print(json.dumps(result["stages"][stage]), file=sys.stderr, flush=True)
            merge(result, args.output)  # what was measured is kept, whatever the next stage does
    finally:
        if args.baseline and baseline(args).exists():
            git("worktree", "remove", "--force", str(baseline(args)))
        if not args.keep:
            shutil.rmtree(args.folder)
    print(json.dumps(merge(result, args.output)))


def merge(result: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Return a result with the stages that its file has besides, and write it there."""
    if output is None:
        return result
    before = json.loads(output.read_text()) if output.exists() else {}
    merged = result | {"stages": before.get("stages", {}) | result["stages"]}
    output.write_text(json.dumps(merged, indent=1) + "\n")
    return merged


if __name__ == "__main__":
    main()
