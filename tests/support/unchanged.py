"""What a change of the layout must leave as it was, bit for bit: latents, keys of References, packs, names, options.

    python -m tests.support.unchanged live > before.json      # with PYTHONPATH at the source of one commit,
    python -m tests.support.unchanged live > after.json       # then of another, on one machine

`live` digests every bit, also in bfloat16 and int8, and so tells commits apart on one machine only. The fixture
(`tests/fixtures/unchanged.json`) holds what does not depend on the machine, and latents to compare within rounding.
Knows the public names only, so that it runs on any commit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import limner

OPENAPI = Path(__file__).parents[2] / "docs" / "openapi.json"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "unchanged.json"


def picture(width: int, height: int, *, seed: int) -> Image.Image:
    """Blocks of colour: no resampling, so the same everywhere."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def calls() -> dict[str, dict[str, Any]]:
    """Calls of a pipeline that go through every argument which changes a picture."""
    one, two = picture(128, 128, seed=1), picture(96, 128, seed=2)
    return {
        "draw": {"prompt": "a red cat", "generator": generators(1), "height": 128, "width": 128},
        "edit one": {"prompt": "make it blue", "image": one, "generator": generators(2)},
        "edit two": {"prompt": "use the background of image 2", "image": [one, two], "generator": generators(3)},
        "two prompts": {
            "prompt": ["a cat", "a dog on a beach"],
            "image": [two],
            "num_images_per_prompt": 2,
            "generator": generators(4, 5, 6, 7),
            "height": 64,
            "width": 128,
            "num_inference_steps": 2,
        },
        "one generator": {
            "prompt": ["a", "b"],
            "generator": torch.Generator().manual_seed(8),
            "height": 64,
            "width": 64,
        },
        "levels": {
            "prompt": "a tree",
            "sigmas": [1.0, 0.6, 0.3],
            "num_inference_steps": 3,
            "generator": generators(9),
            "height": 64,
            "width": 64,
        },
        "short": {
            "prompt": "a long prompt that is cut",
            "max_sequence_length": 16,
            "generator": generators(10),
            "height": 64,
            "width": 64,
        },
    }


def digest(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(x).hexdigest()


def drawn(pipe: limner.Pipeline) -> Iterator[tuple[str, torch.Tensor, str | None]]:
    """Latents and the key of the references of each call."""
    for name, arguments in calls().items():
        out = pipe(**arguments, output_type="latent")
        assert isinstance(out, limner.PipelineOutput)
        yield name, out.images, out.reference_key


def pack(shard: tuple[int, int] | None = None, quantization: str | None = None) -> str:
    """The digest of a pack of made-up K/V: its bytes depend on no machine."""
    from limner.model.kv import LayerKV, ReferenceKV

    g = torch.Generator().manual_seed(1)
    layers = tuple(
        LayerKV(k=torch.randn(1, 64, 2, 16, generator=g), v=torch.randn(1, 64, 2, 16, generator=g)) for _ in range(3)
    )
    report = limner.ReferenceReport(
        original_size=(130, 128),
        oriented=False,
        resized_to=None,
        cut=(1, 0, 1, 0),
        processed_size=(128, 128),
        digest="0" * 64,
    )
    arithmetic = "arithmetic" if "arithmetic" in inspect.signature(limner.References.make).parameters else "kernel"
    references = limner.References.make(
        ReferenceKV(layers=layers),
        weights="1" * 64,
        quantization=quantization,
        reports=(report,),
        prefill_seconds=0.25,
        shard=shard,
        **{arithmetic: "cpu/chunked/float32"},
    )
    with tempfile.TemporaryDirectory() as folder:
        references.save(Path(folder) / "pack.safetensors")
        return f"{references.key} {digest((Path(folder) / 'pack.safetensors').read_bytes())}"


def signatures() -> dict[str, str]:
    """Public names with their arguments; annotations left out, which a move of a type may change."""
    found: dict[str, str] = {}
    for name in limner.__all__:
        value = getattr(limner, name)
        if not inspect.isclass(value):
            found[name] = type(value).__name__
            continue
        members = {"": value} if not dataclasses.is_dataclass(value) else {}
        own = [base for base in value.__mro__ if base.__module__.startswith("limner")]  # what is inherited counts too
        names = {key for base in own for key in vars(base)}
        members |= {key: getattr(value, key) for key in names if not key.startswith("_") or key == "__call__"}
        for key, member in members.items():
            label = f"{name}.{key}" if key else name
            if callable(member):
                with contextlib.suppress(ValueError, TypeError):
                    parameters = inspect.signature(member).parameters.values()
                    found[label] = ", ".join(
                        f"{'*' if p.kind is p.KEYWORD_ONLY else ''}{p.name}"
                        + ("" if p.default is p.empty else f"={p.default!r}")
                        for p in parameters
                    )
            else:
                found[label] = "attribute"
        if dataclasses.is_dataclass(value):
            found[name] = ", ".join(f.name for f in dataclasses.fields(value))
    return found


def options() -> dict[str, Any]:
    """Every command's options: names, default, choices, number of values."""
    from limner.cli import build_parser

    found: dict[str, Any] = {}

    def walk(parser: argparse.ArgumentParser, name: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command, child in action.choices.items():
                    walk(child, f"{name} {command}".strip())
            elif action.dest != "help":
                found[f"{name} {'/'.join(action.option_strings) or action.dest}"] = [
                    repr(action.default),
                    sorted(map(str, action.choices or ())),
                    str(action.nargs),
                    bool(action.required),
                ]

    walk(build_parser(), "")
    return found


def live() -> dict[str, str]:
    """Digests of every bit on this machine: bundled model in three formats, pictures, References."""
    found: dict[str, str] = {}
    formats: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16": {"torch_dtype": torch.bfloat16},
        "int8": {"torch_dtype": torch.bfloat16, "quantize": "int8", "kv_cache_dtype": "int8"},
        "limit": {"memory_limit": "2GiB"},
    }
    for kind, arguments in formats.items():
        pipe = limner.Pipeline.from_pretrained(**arguments)
        found[f"{kind} digest"] = pipe.digest
        for name, latents, key in drawn(pipe):
            found[f"{kind} {name}"] = f"{digest(latents)} {key}"
        references = pipe.prefill([picture(128, 128, seed=1)])
        found[f"{kind} references"] = (
            references.key + " " + " ".join(digest(x) for layer in references.layers for x in layer)
        )
        out = pipe("make it blue", references=references, generator=generators(1))
        buffer = io.BytesIO()
        out.images[0].save(buffer, "PNG")  # type: ignore[union-attr]
        found[f"{kind} picture"] = digest(buffer.getvalue())
        if kind == "float32":
            found["numpy"] = digest(pipe("a", generator=generators(1), output_type="np").images.tobytes())  # type: ignore[union-attr]
            found["pt"] = digest(pipe("a", generator=generators(1), output_type="pt").images)  # type: ignore[union-attr]
    return found


def fixture() -> dict[str, Any]:
    """What `tests/contract/test_unchanged.py` compares with; run at the commit that is to be kept."""
    pipe = limner.Pipeline.from_pretrained(reference_policy=limner.ReferencePolicy(sizes=()))
    latents, keys = {}, {}
    for name, x, key in drawn(pipe):
        latents[name] = [list(x.shape), [float(f"{value:.6g}") for value in x.flatten()[::7].tolist()]]
        keys[name] = key
    return {
        "latents": latents,
        "keys": keys,
        "digest": pipe.digest,
        "packs": {"whole": pack(), "shard": pack(shard=(1, 2)), "int8": pack(quantization="int8")},
        "names": signatures(),
        "options": options(),
        "openapi": digest(OPENAPI.read_bytes()),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["fixture"]:
        FIXTURE.write_text(json.dumps(fixture(), indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps(live(), indent=1, sort_keys=True))
