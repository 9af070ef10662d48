"""Models of full size on one machine: random checkpoints of klein's geometry, run under a memory limit.

Builds folders in the diffusers layout (shards, written with one tensor in memory; text encoder layers up to the last one
that is read), runs `limner edit` on them in a process of its own while its memory is watched, and compares with what
`limner.memory` planned; times klein-4B against diffusers. The last line is one JSON object; `-o` merges it into a file, so
that stages may be run one by one.

    .venv/bin/python benchmarks/full_size.py --folder /tmp/full --keep --only 9b-bf16 -o benchmarks/results/full_size.json

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
from limner.config import KLEIN_4B, MODELS, AutoencoderConfig, ModelGeometry, TextConfig, TransformerConfig
from limner.memory import Formats, Request, make_plan, parse_bytes
from limner.model.int8 import has_int8_products
from limner.weights.files import TensorInfo, write_tensors
from limner.weights.folder import bundled_model, load_transformer
from limner.weights.networks import empty_autoencoder, empty_text_network, empty_transformer

STAGES = ("9b-bf16", "9b-int8", "9b-load", "4b-256", "4b-512")
SMALL = ModelGeometry(
    transformer=TransformerConfig(
        num_double_blocks=2,
        num_single_blocks=3,
        num_heads=2,
        head_dim=128,
        text_width=384,
        in_channels=16,
        out_channels=16,
    ),
    text_encoder=TextConfig(
        width=128, mlp_width=256, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=64, vocab_size=768, num_used=3
    ),
    autoencoder=AutoencoderConfig(
        encoder_channels=(4, 4, 8, 8),
        decoder_channels=(4, 4, 8, 8),
        num_resnets=1,
        latent_channels=4,
        mid_attention=False,
    ),
)
SHARD = 5_000_000_000
BLOCK = 16 << 20


class Values:
    """Random bfloat16 values of any shape, cut from one block: full-size models would take minutes to draw."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(BLOCK, generator=generator).bfloat16()
        self._at = 0

    def of(self, name: str, shape: torch.Size) -> Tensor:
        """Return a matrix or kernel that preserves the scale of its input; ones for norms, zeros for biases."""
        if name.endswith("running_var") or (len(shape) == 1 and not name.endswith("bias")):
            return torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) < 2:
            return torch.zeros(shape, dtype=torch.bfloat16)
        number, fan_in = shape.numel(), shape[1:].numel()
        out = torch.empty(number, dtype=torch.bfloat16)
        done = 0
        while done < number:
            part = self._block[self._at : self._at + number - done]
            torch.mul(part, fan_in**-0.5, out=out[done : done + len(part)])
            done, self._at = done + len(part), (self._at + len(part) + 1013) % BLOCK
        return out.view(shape)


def write_network(network: nn.Module, folder: Path, stem: str, config: Mapping[str, Any], values: Values) -> None:
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


def _drawn(shapes: Mapping[str, torch.Size], values: Values) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, values.of(name, shape)


def text_config(text: TextConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def autoencoder_config(geometry: AutoencoderConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": list(geometry.encoder_channels),
        "layers_per_block": geometry.num_resnets,
        "latent_channels": geometry.latent_channels,
        "mid_block_add_attention": geometry.mid_attention,
        "norm_num_groups": min(32, geometry.encoder_channels[0] // 2),
    }
    return config


def build(geometry: ModelGeometry, folder: Path, *, num_text: int) -> Path:
    """Return a model folder with random weights; an existing one is used as it is."""
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    values, text = Values(), geometry.text_encoder
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


def watched(command: list[str], *, cache: Path) -> dict[str, Any]:
    """Run a program to its end; return its last line of output, its seconds and the peaks of its memory."""
    peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0, "VmHWM": 0}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"LIMNER_CACHE": str(cache)}
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


def edit(args: argparse.Namespace, geometry: ModelGeometry, model: Path, *, int8: Path | None) -> dict[str, Any]:
    """Run the target's edit in a process of its own; return its measures and the plan."""
    from PIL import Image

    side, work = args.side, args.folder
    generator = torch.Generator().manual_seed(1)
    pictures = []
    for i in range(2):
        noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
        pictures.append(work / f"reference-{i}.png")
        Image.fromarray(noise.numpy()).resize((side, side)).save(pictures[-1])
    limit = args.limit or ("14GiB" if int8 else "20GiB")
    command = [
        sys.executable,
        "-m",
        "limner",
        "edit",
        "put the first beside the second",
        "-o",
        str(work / "out.png"),
        "--size",
        f"{side}x{side}",
        "--seed",
        "1",
        "--model",
        str(model),
        "--memory-limit",
        limit,
        "--json",
    ]
    for picture in pictures:
        command += ["-i", str(picture)]
    if int8 is not None:
        command += ["--transformer", str(int8)]
    with tempfile.TemporaryDirectory() as cache:  # digests are computed, as in a first run
        found = watched(command, cache=Path(cache))
    output = found.pop("output")
    found |= {"memory_limit": limit, "timings": output["timings"]}
    formats = Formats(quantize="int8" if int8 else None, packed=has_int8_products())
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


def quantized(model: Path, target: Path) -> Path:
    """The transformer of a folder in int8, written once."""
    if not target.exists():
        command = [sys.executable, "-m", "limner", "convert", str(model / "transformer"), "-o", str(target)]
        subprocess.run([*command, "--to", "int8", "--part", "transformer"], check=True, stdout=sys.stderr)
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
    parser.add_argument("--rounds", type=int, default=1, help="of the stages beside diffusers")
    parser.add_argument("--limit", help="memory limit of the edits; default: 20GiB, int8 14GiB")
    parser.add_argument("-o", "--output", type=Path, help="merge the result into this file")
    parser.add_argument("--load-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_worker is not None:
        print(json.dumps(load_worker(args.load_worker, side=args.side, num_text=args.text)))
        return
    small = args.geometry == "small"
    nine, four = (SMALL, SMALL.transformer) if small else (MODELS["klein-9b"], KLEIN_4B)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, int8 = args.folder / f"9b-{args.geometry}", args.folder / f"9b-{args.geometry}-int8"
    result: dict[str, Any] = {"benchmark": "full_size", **machine(torch.device("cpu")), "geometry": args.geometry}
    result["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result |= {"command": shlex.join(["benchmarks/full_size.py", *sys.argv[1:]]), "stages": {}}
    try:
        if any(stage.startswith("9b") for stage in args.only):
            build(nine, model, num_text=args.text)
        for stage in args.only:
            print(f"stage {stage}", file=sys.stderr, flush=True)
            if stage == "9b-load":
                result["stages"][stage] = load(model, side=args.side, num_text=args.text)
            elif stage.startswith("9b"):
                narrow = quantized(model, int8) if stage == "9b-int8" else None
                result["stages"][stage] = edit(args, nine, model, int8=narrow)
            else:
                result["stages"][stage] = beside_diffusers(args, four, args.side if small else int(stage[3:]))
            print(json.dumps(result["stages"][stage]), file=sys.stderr, flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    if args.output:
        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        result["stages"] = before.get("stages", {}) | result["stages"]
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
