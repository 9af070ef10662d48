"""What int8 does to a text encoder: hidden states and seconds at the true width, and pictures of the bundled model.

`true_width` has layers of klein-4b's Qwen3 with random weights, in bfloat16, and 512 positions of which some are read; its
embedding has fewer rows, since a row is read and not multiplied. Hidden states are compared with the same weights in
float32. `outliers` are the same layers with a few channels of every norm much larger, as trained language models have
them. `seconds` are those of one prompt. `bundled` is the bundled model with its weights, in float32 and with int8
matrices: hidden states, and pictures drawn from the same noise. The last line is one JSON object.

    .venv/bin/python benchmarks/int8_text.py -o benchmarks/results/int8_text.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limner import Pipeline
from limner.bench import machine
from limner.config import QWEN3_4B
from limner.model.int8 import Int8Linear, has_int8_products, quantize_layers
from limner.model.qwen3 import Qwen3

PROMPTS = (
    "a big unicorn at sea at the bottom",
    "a tiny panda at the top in the city",
    "draw a big bell in the sunset at the bottom, please",
    "please draw a rocket on plain white in the top left corner",
    "a tiny fox on plain orange at the bottom",
    "a picture of a tiny turtle at the bottom in a forest",
    "draw a pizza on a pink background on the left",
    "a picture of a large crown in the bottom right corner in the desert",
    "please a tiny pig on a red background at the bottom",
    "draw a key on a black background at the bottom",
    "please in a desert in the center: a football",
    "a picture of a little corn on the right on a yellow background",
    "on a red to yellow gradient, a huge cactus in the center",
    "in a room, a pig in the bottom left corner",
    "a small cookie on the left on a beach",
    "a little bee at the bottom on a green to blue gradient",
)
"""Prompts of the bundled model's evaluation, which it was not trained on."""
ROWS = 4096
"""Of the random embedding."""
OUTLIERS, LARGER = 4, 30
"""Channels of each norm, and how many times larger they are."""


def errors(found: Tensor, right: Tensor) -> dict[str, float]:
    """Relative error of all hidden states, and the mean and least cosine of a token's with what it should be."""
    found, right = (x.float().reshape(-1, x.shape[-1]) for x in (found, right))
    cosine = F.cosine_similarity(found, right, dim=-1)
    return {
        "relative": round(((found - right).norm() / right.norm()).item(), 5),
        "cosine_mean": round(cosine.mean().item(), 6),
        "cosine_least": round(cosine.min().item(), 6),
    }


def random_layers(layers: int, *, alike: bool = False) -> Qwen3:
    """Layers of klein-4b's text encoder with random weights in bfloat16; `alike`: those of the first one in all."""
    with torch.device("meta"):
        network = Qwen3(QWEN3_4B | {"num_hidden_layers": layers, "vocab_size": ROWS})
    network = network.bfloat16().to_empty(device="cpu").requires_grad_(False).eval()
    torch.manual_seed(0)
    for part in (network.layers[0] if alike else network.layers, network.norm, network.embed_tokens):
        for p in part.parameters():
            p.normal_(std=p.shape[1] ** -0.5) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    network.embed_tokens.weight.normal_()
    for layer in network.layers if alike else ():
        layer.load_state_dict(network.layers[0].state_dict())
    return network


def larger(network: Qwen3) -> None:
    """Make the same few channels of every norm before a matrix larger."""
    for layer in network.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[:OUTLIERS] *= LARGER


def fastest(run: Callable[[], object], times: int) -> dict[str, float]:
    """Return the seconds of the fastest of some runs, after one to warm up: by the clock, and of all cores together."""
    run()
    laps = []
    for _ in range(times):
        start, worked = time.perf_counter(), time.process_time()
        run()
        laps.append((time.perf_counter() - start, time.process_time() - worked))
    return {"clock": round(min(lap for lap, _ in laps), 3), "cores": round(min(lap for _, lap in laps), 3)}


def positions(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return ids (1, S) and a mask of the first ones."""
    return torch.randint(ROWS, (1, args.tokens)), torch.arange(args.tokens)[None] < args.read


def sizes(args: argparse.Namespace) -> dict[str, int]:
    return {"hidden": QWEN3_4B["hidden_size"], "layers": args.layers, "tokens": args.tokens, "tokens_read": args.read}


def true_width(args: argparse.Namespace) -> dict[str, Any]:
    """Errors of bfloat16 and int8 against float32, without and with outliers."""
    wide = random_layers(args.layers)
    ids, mask = positions(args)
    narrow = copy.deepcopy(wide)
    quantize_layers(narrow)
    places = {f"after layer {args.layers * n // 3}": args.layers * n // 3 for n in (1, 2)} | {
        "after the last, normed": -1
    }

    def compared() -> dict[str, Any]:
        right = copy.deepcopy(wide).float()(ids, mask)
        found = {"bfloat16": wide(ids, mask), "int8": narrow(ids, mask)}
        return {
            place: {name: errors(states[n], right[n]) for name, states in found.items()} for place, n in places.items()
        }

    result: dict[str, Any] = {**sizes(args), "errors": compared()}
    for network in (wide, narrow):
        larger(network)
    return result | {"outliers": {"channels": OUTLIERS, "times": LARGER, "errors": compared()}}


def seconds(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one prompt; all layers have the same values, in memory of their own."""
    wide = random_layers(args.layers, alike=True)
    ids, mask = positions(args)
    laps = {"bfloat16": fastest(lambda: wide(ids, mask), args.times)}
    quantize_layers(wide)
    matrices = [module for module in wide.modules() if isinstance(module, Int8Linear)]

    def packed_anew() -> None:
        for module in matrices:
            module.unpack()
        wide(ids, mask)

    laps["int8"] = fastest(lambda: wide(ids, mask), args.times)
    if has_int8_products():
        laps["int8 with packing, the first prompt"] = fastest(packed_anew, 1)
    ratio = {kind: round(laps["bfloat16"][kind] / laps["int8"][kind], 2) for kind in ("clock", "cores")}
    return {**sizes(args), "seconds": laps, "ratio": ratio}


def bundled() -> dict[str, Any]:
    wide, half = Pipeline.from_pretrained(), Pipeline.from_pretrained(dtype=torch.bfloat16)
    narrow = Pipeline.from_pretrained(quantize_text=True)
    states: dict[str, list[Tensor]] = {"float32": [], "int8": []}
    psnr: dict[str, list[float]] = {"int8 text encoder": [], "all in bfloat16": []}
    for number, prompt in enumerate(PROMPTS):
        pictures = []
        for pipe in (wide, narrow, half):
            generator = torch.Generator().manual_seed(number)
            pictures.append(pipe(prompt, generator=generator, output_type="pt").images.float())
        for name, picture in zip(psnr, pictures[1:], strict=True):
            psnr[name].append(-10 * math.log10(max((picture - pictures[0]).square().mean().item(), 1e-12)))
        for name, pipe in (("float32", wide), ("int8", narrow)):
            tokenized = pipe.text_encoder.tokenize(prompt, max_sequence_length=pipe.text_encoder.max_length)
            states[name].append(pipe.text_encoder([tokenized]))
    return {
        "prompts": len(PROMPTS),
        "errors": errors(*(torch.cat(states[name]) for name in ("int8", "float32"))),
        "psnr_db": {
            name: {"least": round(min(found), 1), "median": round(statistics.median(found), 1)}
            for name, found in psnr.items()
        },
    }


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "bundled": lambda args: bundled(),
    "true_width": true_width,
    "seconds": seconds,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="of klein-4b's 27 that are read")
    parser.add_argument("--tokens", type=int, default=512, help="positions")
    parser.add_argument("--read", type=int, default=60, help="positions that are no padding")
    parser.add_argument("--times", type=int, default=3, help="runs that are timed")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="others are kept as they are"
    )
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "int8_text"}
    if args.output and args.output.exists():
        result = json.loads(args.output.read_text())
    how = {**machine(torch.device("cpu")), "command": shlex.join(["benchmarks/int8_text.py", *sys.argv[1:]])}
    for name in args.only:
        result[name] = how | MEASURES[name](args)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
