"""What int8 does to a text encoder: hidden states and seconds at the true width, and pictures of the bundled model.

`true_width` has layers of klein-4b's Qwen3 with random weights, in bfloat16, and 512 positions of which some are read; its
embedding has fewer rows, since a row is read and not multiplied. Hidden states are compared with the same weights in
float32. `outliers` are the same layers with a few channels of every norm much larger, as trained language models have
them. `bundled` is the bundled model with its weights, in float32 and with int8 matrices. The last line is one JSON object.

    .venv/bin/python benchmarks/int8_text.py -o benchmarks/results/int8_text.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
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


def random_layers(layers: int, rows: int) -> Qwen3:
    """Layers of klein-4b's text encoder with random weights in bfloat16."""
    with torch.device("meta"):
        network = Qwen3(QWEN3_4B | {"num_hidden_layers": layers, "vocab_size": rows})
    network = network.bfloat16().to_empty(device="cpu").requires_grad_(False).eval()
    torch.manual_seed(0)
    for p in network.parameters():
        p.normal_(std=p.shape[1] ** -0.5) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    network.embed_tokens.weight.normal_()
    return network


def larger(network: Qwen3) -> None:
    """Make the same few channels of every norm before a matrix larger."""
    for layer in network.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[:OUTLIERS] *= LARGER


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the median of some runs, after one to warm up."""
    run()
    laps = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps)


def true_width(args: argparse.Namespace) -> dict[str, Any]:
    wide = random_layers(args.layers, rows=4096)
    ids = torch.randint(4096, (1, args.tokens))
    mask = torch.arange(args.tokens)[None] < args.read
    read = [args.layers * n // 3 for n in (1, 2, 3)]
    narrow = copy.deepcopy(wide)
    quantize_layers(narrow)

    def compared() -> dict[str, Any]:
        right = copy.deepcopy(wide).float()(ids, mask)
        found = {"bfloat16": wide(ids, mask), "int8": narrow(ids, mask)}
        return {
            f"after layer {n}": {name: errors(states[n], right[n]) for name, states in found.items()} for n in read[:2]
        } | {"after the last layer, normed": {name: errors(x[-1], right[-1]) for name, x in found.items()}}

    result: dict[str, Any] = {"hidden": wide.config.hidden_size, "layers": args.layers}
    result |= {"tokens": args.tokens, "tokens_read": args.read, "errors": compared()}
    matrices = [module for module in narrow.modules() if isinstance(module, Int8Linear)]

    def packed_anew() -> None:
        for module in matrices:
            module.unpack()
        narrow(ids, mask)

    laps = {"bfloat16": seconds(lambda: wide(ids, mask), args.times)}
    laps["int8"] = seconds(lambda: narrow(ids, mask), args.times)
    if has_int8_products():
        laps["int8, packed anew, as under a memory limit"] = seconds(packed_anew, args.times)
    result["seconds"] = {name: round(value, 3) for name, value in laps.items()}
    result["ratio"] = round(laps["bfloat16"] / laps["int8"], 2)
    for network in (wide, narrow):
        larger(network)
    result["outliers"] = {"channels": OUTLIERS, "times": LARGER, "errors": compared()}
    return result


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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="of klein-4b's 27 that are read")
    parser.add_argument("--tokens", type=int, default=512, help="positions")
    parser.add_argument("--read", type=int, default=60, help="positions that are no padding")
    parser.add_argument("--times", type=int, default=3, help="runs that are timed")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    result = {"benchmark": "int8_text", **machine(torch.device("cpu")), "bundled": bundled()}
    result["true_width"] = true_width(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
