"""One step of the transformer beside OpenVINO: the same random weights and inputs, in turn, medians.

OpenVINO, NNCF and a torch of their own are in build/openvino-venv, which this program makes (1.7 GB); Limner never needs
them. Weights, inputs and results go through files, calls through a pipe to a process of that environment; the one that is
not measured waits. The last line is one JSON object. `--prepare` makes the environment and OpenVINO's files, and stops:
the measurement then begins at once.

    .venv/bin/python benchmarks/openvino_step.py --prepare
    .venv/bin/python benchmarks/openvino_step.py -o benchmarks/results/openvino_step.json

Engines: diffusers (torch, bfloat16); limner and limner_int8; openvino_bf16; and OpenVINO's three ways to int8,
openvino_int8_weights (weights alone), openvino_int8_dynamic (activations are quantized as they come) and openvino_int8
(NNCF's quantization, calibrated with the inputs of the measurement and three others). Position ids are constants of
OpenVINO's model, so that it computes no rotary table; Limner's is made before, as it is once for all steps of a call.
Errors are against diffusers in float32.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "openvino-venv"
PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0", "torch", "diffusers", "transformers", "safetensors")
"""With the versions of constraints.txt, where that has them."""
OPENVINO = ("openvino_bf16", "openvino_int8_weights", "openvino_int8_dynamic", "openvino_int8")
ENGINES = ("diffusers", "limner", "limner_int8", *OPENVINO)
INPUTS = ("img", "txt", "sigma")
MODELS = ("plain", "weights", "quantized")


# in the environment of OpenVINO; nothing of limner is imported


def network(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """diffusers' transformer with the weights of a folder."""
    from diffusers import Flux2Transformer2DModel
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    made = Flux2Transformer2DModel(**config).to(dtype)
    made.load_state_dict(load_file(folder / "weights.safetensors"))
    return made.eval()


class Step(torch.nn.Module):
    """A step whose position ids are constants."""

    def __init__(self, transformer: torch.nn.Module, img_ids: torch.Tensor, txt_ids: torch.Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("img_ids", img_ids)
        self.register_buffer("txt_ids", txt_ids)

    def forward(self, img: torch.Tensor, txt: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.transformer(img, txt, sigma, self.img_ids, self.txt_ids, return_dict=False)[0]


def convert(folder: Path) -> None:
    """Write OpenVINO's models of a folder's weights, those that are not there."""
    import nncf
    import openvino as ov
    from safetensors.torch import load_file

    given = load_file(folder / "inputs.safetensors")
    inputs = tuple(given[name].float() for name in INPUTS)
    core, plain = ov.Core(), folder / "plain.xml"
    if not plain.exists():
        step = Step(network(folder, torch.float32), given["img_ids"], given["txt_ids"])
        with torch.no_grad():
            converted = ov.convert_model(step, example_input=inputs, input=[tuple(x.shape) for x in inputs])
        ov.save_model(converted, plain, compress_to_fp16=False)
        print(f"wrote {plain}", file=sys.stderr, flush=True)
    if not (folder / "weights.xml").exists():
        mode = nncf.CompressWeightsMode.INT8_SYM
        ov.save_model(nncf.compress_weights(core.read_model(plain), mode=mode), folder / "weights.xml")
    if not (folder / "quantized.xml").exists():
        generator = torch.Generator().manual_seed(1)
        samples = [[x.numpy() for x in inputs]]
        for sigma in (1.0, 0.7, 0.3):
            others = [torch.randn(x.shape, generator=generator).numpy() for x in inputs[:2]]
            samples.append([*others, torch.full_like(inputs[2], sigma).numpy()])
        quantized = nncf.quantize(
            core.read_model(plain), nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=4
        )
        ov.save_model(quantized, folder / "quantized.xml")


def serve(folder: Path, threads: int, engines: list[str]) -> None:
    """Compile the models; then for each line of stdin, the name of one, write its result and print its seconds."""
    import numpy as np
    import openvino as ov
    from safetensors.torch import load_file

    core = ov.Core()
    common = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    files: dict[str, tuple[str, dict[str, Any]]] = {
        "openvino_bf16": ("plain.xml", {}),
        "openvino_int8_weights": ("weights.xml", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}),
        "openvino_int8_dynamic": ("weights.xml", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 2**32 - 1}),
        "openvino_int8": ("quantized.xml", {}),
    }
    compiled = {name: core.compile_model(folder / files[name][0], "CPU", common | files[name][1]) for name in engines}
    requests = {name: model.create_infer_request() for name, model in compiled.items()}
    given = load_file(folder / "inputs.safetensors")
    inputs = [given[name].float().numpy() for name in INPUTS]
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        velocity = requests[name].infer(inputs, share_inputs=True)[0]
        seconds = time.perf_counter() - start
        np.save(folder / f"{name}.npy", velocity)
        print(seconds, flush=True)


# in Limner's


def make_environment() -> Path:
    """Return the Python of OpenVINO's environment, which is made at first use."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    wanted = " ".join(PACKAGES)
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"making {ENVIRONMENT}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", ROOT / "constraints.txt", *PACKAGES], check=True, stdout=sys.stderr)
        ready.write_text(wanted)
    return python


class Worker:
    """The process with OpenVINO's models."""

    def __init__(self, python: Path, folder: Path, engines: list[str]) -> None:
        command = [python, __file__, "--serve", folder, "--threads", str(torch.get_num_threads())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*command, "--engines", *engines], stdin=pipe, stdout=pipe, text=True)
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of OpenVINO ended with exit code {self._process.wait()}")
        return line

    def run(self, name: str) -> float:
        """Run a model and return its seconds."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the report; with `--prepare` an empty one."""
    import numpy as np
    from safetensors.torch import save_file

    from limner.bench import Bench, BenchCase, geometry, machine

    config = geometry(*args.geometry)
    bench = Bench(config, dtype=torch.bfloat16)
    case = BenchCase(num_references=0, side=args.side, num_text=args.text)
    given = bench.inputs(case)
    sigma = given["sigmas"][1:2].to(bench.dtype)
    folder: Path = args.folder / "-".join(map(str, (*args.geometry, args.side, args.text)))
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(bench.ours.state_dict(), folder / "weights.safetensors")
        inputs = {"img": given["noise"], "txt": given["txt"], "sigma": sigma}
        ids = {name: given[name].contiguous() for name in ("img_ids", "txt_ids")}
        save_file(
            {name: value.contiguous() for name, value in {**inputs, **ids}.items()}, folder / "inputs.safetensors"
        )
        shape = {name: value for name, value in config.to_diffusers().items() if not name.startswith("_")}
        (folder / "config.json").write_text(json.dumps(shape))
    python = make_environment()
    if not all((folder / f"{name}.xml").exists() for name in MODELS):
        subprocess.run([python, __file__, "--convert", folder], check=True, stdout=sys.stderr)
    if not (folder / "expected.npy").exists():
        step = Step(network(folder, torch.float32), given["img_ids"], given["txt_ids"])
        with torch.no_grad():
            exact = step(given["noise"].float(), given["txt"].float(), sigma.float()).numpy()
        np.save(folder / "expected.npy", exact)
    if args.prepare:
        return {}
    expected = np.load(folder / "expected.npy")
    rope = bench.ours.rope(torch.cat([given["txt_ids"], given["img_ids"]]))
    ids = {name: given[name] for name in ("img_ids", "txt_ids")}
    theirs = Step(bench.theirs, given["img_ids"], given["txt_ids"])

    @torch.no_grad()
    def call(name: str) -> torch.Tensor:
        if name == "diffusers":
            return theirs(given["noise"], given["txt"], sigma)
        model = bench.int8() if name == "limner_int8" else bench.ours
        return model(given["noise"], given["txt"], sigma[0], **ids, rope=rope)

    report = {"benchmark": "openvino_step", **machine(torch.device("cpu"))}
    report["versions"] |= {name: version for name, _, version in (one.partition("==") for one in PACKAGES) if version}
    report |= {"geometry": {"hidden": config.width, "double": args.geometry[1], "single": args.geometry[2]}}
    report |= {"tokens": {"text": args.text, "image": given["noise"].shape[1]}, "arithmetic": bench.ours.arithmetic}
    report |= {"command": shlex.join(["benchmarks/openvino_step.py", *sys.argv[1:]])}
    seconds: dict[str, list[float]] = {name: [] for name in args.engines}
    results: dict[str, Any] = {}
    worker = Worker(python, folder, [name for name in args.engines if name in OPENVINO])
    for number in range(args.rounds + 1):  # the first warms up and is not counted
        for name in args.engines:
            if name in OPENVINO:
                took = worker.run(name)
                results[name] = np.load(folder / f"{name}.npy")
            else:
                start = time.perf_counter()
                velocity = call(name)
                took = time.perf_counter() - start
                results[name] = velocity.float().numpy()
            if number:
                seconds[name].append(took)
            print(f"round {number}: {name} {took:.3f} s", file=sys.stderr, flush=True)
        if number:
            report |= {**summary(seconds), **errors(results, expected)}
            write(report, args.output)  # what was measured is kept
    worker.close()
    return report


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians over rounds, the quickest ones, all of them, and ratios of both."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    return {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "all_seconds": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
        "ratios": ratios(medians),
        "ratios_of_quickest": ratios(least),
    }


def write(report: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


def ratios(medians: dict[str, float]) -> dict[str, Any]:
    """Return by how much Limner is faster than OpenVINO: in bfloat16, and in int8 than its best; of seconds by engine."""
    found = {}
    if {"limner", "openvino_bf16"} <= medians.keys():
        found["times_openvino_bf16"] = round(medians["openvino_bf16"] / medians["limner"], 3)
    int8 = [name for name in OPENVINO if "int8" in name and name in medians]
    if int8 and "limner_int8" in medians:
        best = min(int8, key=medians.__getitem__)
        found |= {"best_openvino_int8": best, "times_openvino_int8": round(medians[best] / medians["limner_int8"], 3)}
    return found


def errors(results: dict[str, Any], expected: Any) -> dict[str, Any]:
    """Return the largest error of each result, and the norm of the error over that of the exact one."""
    import numpy as np

    return {
        "largest_expected": round(float(np.abs(expected).max()), 4),
        "max_error": {name: round(float(np.abs(value - expected).max()), 5) for name, value in results.items()},
        "relative_error": {
            name: round(float(np.linalg.norm(value - expected) / np.linalg.norm(expected)), 6)
            for name, value in results.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", type=int, nargs=3, default=[8, 2, 6], help="heads of 128, double, single blocks")
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels (512: 1,024 tokens)")
    parser.add_argument("--text", type=int, default=512, help="text tokens (512)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "openvino-step", help="files of both engines")
    parser.add_argument("--prepare", action="store_true", help="make the environment and the files, and stop")
    parser.add_argument("-o", "--output", type=Path, help="write the JSON here")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        convert(args.convert)
    elif args.serve:
        serve(args.serve, args.threads, args.engines)
    elif report := measure(args):
        print(json.dumps(report))


if __name__ == "__main__":
    main()
