"""What a hit costs: in memory, for a decoded reference of 1 megapixel; from disk, beside its prefill at the 4B geometry.

The memory hit is `pipe.prefill(picture)` of the bundled model with the picture known: preparing, digest, look-up. A part
of it grows with the model, looking whether weights were changed in place: that is measured at the 4B geometry too. The
disk hit is a new store that reads the entry of random weights (hidden 3072, 5 double- and 20 single-stream blocks by
default), checksums included, with the file in the page cache and, where the system lets go of it, from the device.
Medians, of the prefill one run; the last line is one JSON object.

    .venv/bin/python benchmarks/store.py -o benchmarks/results/store.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from limner import Pipeline, ReferenceStore
from limner.bench import geometry, machine, random_transformer
from limner.images import ReferenceReport
from limner.references import References
from limner.tokens import reference_ids
from limner.weights.digest import fingerprint


def median_seconds(call: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory_hit(side: int, rounds: int) -> float:
    pipe = Pipeline.from_pretrained()
    noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())
    pipe.prefill(picture)
    return median_seconds(lambda: pipe.prefill(picture), rounds)


@torch.no_grad()
def disk_hit(shape: list[int], side: int, rounds: int, folder: Path) -> dict[str, float]:
    config = geometry(*shape)
    transformer = random_transformer(config)
    grid = (side // 16, side // 16)
    tokens = torch.randn(1, grid[0] * grid[1], config.in_channels).bfloat16()
    transformer.prefill(tokens[:, :16], reference_ids([(4, 4)]))
    start = time.perf_counter()  # a minute at the 4B geometry: once
    kv = transformer.prefill(tokens, reference_ids([grid]))
    prefill = time.perf_counter() - start
    size = (side, side)
    report = ReferenceReport(
        original_size=size, oriented=False, resized_to=None, cut=(0, 0, 0, 0), processed_size=size, digest="0" * 64
    )
    made = References.make(
        kv,
        weights="0" * 64,
        kernel=transformer.arithmetic,
        quantization=None,
        reports=(report,),
        prefill_seconds=prefill,
    )
    store = ReferenceStore(disk_path=folder)
    store.put(made)
    store.flush()
    (file,) = folder.glob("*.safetensors")

    def read() -> None:
        def never() -> References:
            raise AssertionError("the entry was not read")

        assert ReferenceStore(disk_path=folder).get(made.key, never)[1] == "disk"

    def forget() -> None:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    fingerprint(transformer)
    return {
        "weights_check_seconds": median_seconds(lambda: fingerprint(transformer), rounds * 3),
        "bytes": made.nbytes,
        "prefill_seconds": prefill,
        "disk_hit_seconds_cached": median_seconds(read, rounds),
        "disk_hit_seconds": median_seconds(read, rounds, forget),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="of the reference, in pixels")
    parser.add_argument(
        "--geometry", type=int, nargs=3, default=[24, 5, 20], help="heads of 128, double, single blocks"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    result = {"benchmark": "store", **machine(torch.device("cpu")), "reference_side": args.side}
    result["memory_hit_seconds"] = round(memory_hit(args.side, args.rounds * 3), 5)
    with tempfile.TemporaryDirectory() as folder:
        found = disk_hit(args.geometry, args.side, args.rounds, Path(folder))
    result |= {name: value if name == "bytes" else round(value, 4) for name, value in found.items()}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
