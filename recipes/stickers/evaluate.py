"""Evaluates a model on prompts that training never saw, against the rendered truth.

The last line is one JSON object: by task, over `--cases` cases each, PSNR in dB, SSIM, success rate and what of it was
right, beside two baselines: copying reference 1 (for `draw` a grey picture), and the nearest picture to the truth in a set made
as the training sets are (the median, and `in_training`, the share of cases whose very picture it
holds: plain scenes and single stickers repeat). `gain_differs` is the gain in dB over copying on the pixels where truth and reference 1 differ.
`held_out` are edits and combinations of stickers that no training picture shows: only copying from a reference can bring them.
`mask`, `outpaint` and `preserve` keep a part of the picture: `changed_outside` are the pixels outside of a mask that are not
the input's, `new_area` is the PSNR in dB where a picture was continued and `continued` that of its edges drawn out,
`untouched` that of the pixels which an edit should leave alone, and `untouched_away` that of those of them further than half a
token (8 pixels) from what it should change.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common import find_font
from controls import CONTROLS, Control, control_cases, untouched
from judge import Pixels, judge, pixels, psnr
from limner import Pipeline
from tasks import Example, Grammar
from world import HELD_OUT, SIZES, STICKERS, Picture, Renderer

TASKS = ("draw", "edit", "combine2", "combine3", "combine4", "held_out")
DIFFERENT = 8 / 255
SAME_PICTURE = 60.0
CARD = Path(__file__).parent / "model-card.md"
MARKS = ("<!-- evaluation -->", "<!-- end of evaluation -->")
CONTROL_MARKS = ("<!-- control -->", "<!-- end of control -->")
MEASURES = (
    ("mask", "changed_outside", "", "pixels outside of the mask that are not the input's, a case"),
    ("outpaint", "new_area", " dB", "new area"),
    ("outpaint", "continued", " dB", "new area, if the edges were drawn out"),
    ("edit", "untouched", " dB", "all pixels that should stay, without `preserve`"),
    ("preserve", "untouched", " dB", "all pixels that should stay"),
    ("edit", "untouched_away", " dB", "those further than 8 pixels from what should change, without `preserve`"),
    ("preserve", "untouched_away", " dB", "those further than 8 pixels from what should change"),
)
"""Task, name in the results, unit, and how the model card calls it."""


def cases(task: str, num: int, *, seed: int = 0) -> list[Example]:
    """Fixed cases of a task; those of `held_out` show the sticker that only a reference can bring."""
    if task in CONTROLS:
        return [*control_cases(task, num, seed=seed)]
    rng = random.Random(f"{seed}/{task}/evaluation")
    if task != "held_out":
        grammar = Grammar([*STICKERS.values()], evaluation=True)
        return [grammar.draw(rng, task) for _ in range(num)]
    grammar = Grammar([*HELD_OUT.values()], evaluation=True)
    found: list[Example] = []
    while len(found) < num:
        example = grammar.draw(rng, ("edit", "combine2")[len(found) % 2])
        if example.result.stickers:
            found.append(example)
    return found


class NearestTraining:
    """Find the training picture that is nearest to a picture: by thumbnails, then by pixels."""

    def __init__(self, renderer: Renderer, *, sittings: int, pool: int, asks: int = 4, seed: int = 0) -> None:
        from prepare import TASKS as MIX

        self._renderer = renderer
        rng = random.Random(f"{seed}/examples")
        grammar = Grammar([*STICKERS.values(), *renderer.unnamed_glyphs()], pool=pool, seed=seed)
        tasks = rng.choices(list(MIX), list(MIX.values()), k=sittings)
        self._pictures: dict[tuple[int, int], list[Picture]] = {}
        for task in tasks:
            for example in grammar.sitting(rng, task, asks):
                for picture in {example.result, *example.references}:
                    self._pictures.setdefault(picture.size, []).append(picture)
        self._thumbs = {
            size: np.stack([self._thumb(renderer.render(p)) for p in some]) for size, some in self._pictures.items()
        }

    @staticmethod
    def _thumb(image: Image.Image) -> np.ndarray:
        return np.asarray(image.reduce(8), np.float16).ravel() / 255

    def psnr(self, truth: Picture) -> float:
        image = self._renderer.render(truth)
        thumbs, right = self._thumbs[truth.size], pixels(image)
        distances = np.concatenate(
            [
                np.square(thumbs[i : i + 4096].astype(np.float32) - self._thumb(image)).sum(-1)
                for i in range(0, len(thumbs), 4096)
            ]
        )
        near = np.argsort(distances)[:16]
        return max(psnr(pixels(self._renderer.render(self._pictures[truth.size][i])), right) for i in near)


def copied(references: list[Image.Image], size: tuple[int, int]) -> Pixels:
    """The baseline: reference 1, or grey where there is none."""
    return pixels(references[0].resize(size) if references else Image.new("RGB", size, (128, 128, 128)))


def restored(pipe: Pipeline, picture: Image.Image) -> Image.Image:
    """A picture through the autoencoder alone."""
    x = torch.from_numpy(pixels(picture)).permute(2, 0, 1)[None] * 2 - 1
    with torch.no_grad():
        coder = pipe.autoencoder
        back = coder.decode(coder.denormalise(coder.encode(x))).float().clamp(-1, 1)
    return Image.fromarray(((back[0].permute(1, 2, 0) / 2 + 0.5) * 255).round().byte().numpy())


def load(args: argparse.Namespace) -> Pipeline:
    """The model that is evaluated."""
    return Pipeline.from_pretrained(
        args.model,
        torch_dtype=getattr(torch, args.dtype) if args.dtype else None,
        quantize=args.quantize,
        quantize_text=args.quantize_text,
        kv_cache_dtype=args.kv_cache_dtype,
    )


def made_with(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on beside the task: two results with the same of it can stand in one table."""
    pipe = load(args)
    return {
        "cases": args.cases,
        "steps": args.steps,
        "model": pipe.digest,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "quantize": args.quantize,
        "quantize_text": args.quantize_text,
        "kv_cache_dtype": args.kv_cache_dtype,
    }


def run_cases(task: str, numbers: list[int], args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """One dictionary of measures a case, and the digest of each picture; runs in a process of its own."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    renderer = Renderer(find_font(args.font))
    pipe = load(args)
    rows, digests = [], {}
    for number, case in enumerate(cases(task, args.cases)):
        if number not in numbers:
            continue
        references = [renderer.render(p) for p in case.references]
        truth = renderer.render(case.result)
        given = case.arguments(renderer) if isinstance(case, Control) else {"image": references or None}
        if args.ceiling:
            out = restored(pipe, truth)
        else:
            out = pipe(
                case.prompt,
                **given,
                width=truth.width,
                height=truth.height,
                num_inference_steps=args.steps,
                generator=torch.Generator().manual_seed(number),
            ).images[0]
        area = case.new_area(renderer) if isinstance(case, Control) else None
        verdict = judge(out, case.result, references=case.references, renderer=renderer, new_area=area)
        digests[number] = hashlib.sha256(out.tobytes()).hexdigest()
        right, copy = pixels(truth), copied(references, truth.size)
        row = {
            name: getattr(verdict, name) for name in ("psnr", "ssim", "success", "sticker", "place", "form", "scene")
        }
        if isinstance(case, Control):
            row |= case.kept(out, renderer)
        elif task == "edit":  # what `preserve` is to be compared with
            row |= untouched(out, case, renderer)
        row["copy"] = psnr(copy, right)
        differs = np.abs(copy - right).max(-1) > DIFFERENT
        if references and differs.any():
            row["gain_differs"] = psnr(pixels(out), right, differs) - psnr(copy, right, differs)
        if args.failures and not verdict.success:
            args.failures.mkdir(parents=True, exist_ok=True)
            sheet([[*references, out, truth]]).save(args.failures / f"{task}-{number}.png")
            wrong = [n for n in ("sticker", "place", "form", "scene") if not getattr(verdict, n)]
            (args.failures / f"{task}-{number}.txt").write_text(f"{case.prompt}\nwrong: {', '.join(wrong)}\n")
        rows.append(row)
    return rows, digests


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures in rows, the last two of each (result, truth) in columns of their own."""
    columns, side = max(len(row) for row in rows), 4 + max(itertools.chain(*SIZES))
    image = Image.new("RGB", (columns * side, len(rows) * side), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            column = x if x < len(row) - 2 else columns - len(row) + x
            image.paste(picture, (column * side, y * side))
    return image


def save_cases(folder: Path, renderer: Renderer, *, num: int = 4, num_controls: int = 2) -> None:
    """The first cases of each task as files, for tests."""
    folder.mkdir(parents=True, exist_ok=True)
    saved: list[dict[str, Any]] = []
    for task in TASKS:
        for number, case in enumerate(cases(task, num)):
            names = [f"{task}-{number}-{i}.png" for i in range(1, len(case.references) + 1)]
            names.append(f"{task}-{number}-truth.png")
            for name, picture in zip(names, [*case.references, case.result], strict=True):
                renderer.render(picture).save(folder / name)
            saved.append({"task": task, "prompt": case.prompt, "references": names[:-1], "truth": names[-1]})
    for task in CONTROLS:
        for number, control in enumerate(control_cases(task, num_controls)):
            given = control.arguments(renderer)
            pictures = {f"{task}-{number}-{i}.png": one for i, one in enumerate(given.pop("image"), start=1)}
            row = {"task": task, "prompt": control.prompt, "references": [*pictures]}
            row["truth"] = f"{task}-{number}-truth.png"
            pictures[row["truth"]] = renderer.render(control.result)
            if "mask_image" in given:
                pictures[f"{task}-{number}-mask.png"] = given["mask_image"]
                given["mask_image"] = f"{task}-{number}-mask.png"
            for name, image in pictures.items():
                image.save(folder / name)
            saved.append(row | {"control": given})
    (folder / "cases.json").write_text(json.dumps(saved, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| task | PSNR | SSIM | success | sticker | place | form | scene | copying reference 1 | gain where they differ | nearest training picture | training holds it |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, row in result["tasks"].items():
        rates = " | ".join(f"{100 * row[name]:.1f} %" for name in ("success", "sticker", "place", "form", "scene"))
        gain, nearest = (f"{row[name]:.1f}" if name in row else "" for name in ("gain_differs", "nearest"))
        held = f"{row['in_training']:.0%}" if "in_training" in row else ""
        lines.append(
            f"| {task} | {row['psnr']:.1f} | {row['ssim']:.3f} | {rates} | {row['copy']:.1f} | {gain} | {nearest} | {held} |"
        )
    return "\n".join(lines)


def control_table(result: dict[str, Any]) -> str:
    """What stays and what is continued, as Markdown."""
    lines = ["| task | measure | |", "|---|---|---|"]
    for task, name, unit, text in MEASURES:
        if name in (row := result["tasks"].get(task, {})):
            lines.append(f"| {task} | {text} | {row[name]:.1f}{unit} |")
    return "\n".join(lines)


def check_alike(path: Path, made: dict[str, Any], tasks: Sequence[str]) -> bool:
    """Return True if the results of a file were made with the same as `made`; False if there are none that would stay.

    Raises `ValueError` where results of other tasks would stand in one table with those of another model or arithmetic.
    """
    before = json.loads(path.read_text()) if path.is_file() else {"tasks": {}}
    names = [name for name in made if name != "tasks" and (name not in before or before[name] != made[name])]
    others = [task for task in before["tasks"] if task not in tasks]
    if names and others:
        differ = ", ".join(f"{name} {before.get(name, 'unknown')}, now {made[name]}" for name in names)
        raise ValueError(
            f"{path} has {', '.join(others)} made otherwise ({differ}); run these tasks too, or write another"
        )
    return not names


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the results as JSON, and into the model card; what the file has and was not measured now stays, if made alike.

    Raises `ValueError` as `check_alike`.
    """
    if check_alike(path, result, [*result["tasks"]]):
        before = json.loads(path.read_text())["tasks"]
        found = before | {task: {**before.get(task, {}), **row} for task, row in result["tasks"].items()}
        result = {**result, "tasks": {task: found[task] for task in (*TASKS, *CONTROLS) if task in found}}
    path.write_text(json.dumps(result, indent=1) + "\n")
    card = CARD.read_text()
    for (start, end), text in ((MARKS, table(result)), (CONTROL_MARKS, control_table(result))):
        card = re.sub(f"{start}.*{end}", lambda _, s=start, t=text, e=end: f"{s}\n{t}\n{e}", card, flags=re.DOTALL)
    CARD.write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: the bundled model")
    parser.add_argument("--cases", type=int, default=200, help="cases a task")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, *CONTROLS), default=(*TASKS, *CONTROLS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the model")
    parser.add_argument("--quantize", choices=("int8",), help="weights and activations of the transformer")
    parser.add_argument("--quantize-text", action="store_true", help="the same of the text encoder")
    parser.add_argument("--kv-cache-dtype", choices=("int8", "fp8"), help="format of kept K/V")
    parser.add_argument(
        "--ceiling", action="store_true", help="judge the truth, encoded and decoded: what no transformer can beat"
    )
    parser.add_argument("--font", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--nearest", type=int, default=12000, help="sittings of the training set to search; 0: none")
    parser.add_argument("--nearest-seed", type=int, default=12, help="its seed, as in prepare.py")
    parser.add_argument("--pool", type=int, default=14000, help="as in prepare.py")
    parser.add_argument("--failures", type=Path, help="folder for pictures of the cases that failed")
    parser.add_argument("--save-cases", type=Path, help="write the first four cases of each task, for tests, and stop")
    parser.add_argument("--digests", type=Path, help="write the SHA-256 of each picture as JSON, to compare commits")
    parser.add_argument(
        "--write",
        type=Path,
        help="write the results as JSON, beside those of other tasks there, and into the model card beside this file",
    )
    args = parser.parse_args()
    if args.write and args.ceiling:
        parser.error("--write: what --ceiling measures is no result of the model; leave one out")
    renderer = Renderer(find_font(args.font))
    if args.save_cases:
        save_cases(args.save_cases, renderer)
        return
    with ProcessPoolExecutor(1) as pool:
        made = pool.submit(made_with, args).result()
    if args.write:
        check_alike(args.write, made, args.tasks)  # before hours are spent
    results: dict[str, dict[str, float]] = {}
    digests: dict[str, dict[int, str]] = {}
    training = (
        NearestTraining(renderer, sittings=args.nearest, pool=args.pool, seed=args.nearest_seed)
        if args.nearest
        else None
    )
    with ProcessPoolExecutor(args.workers) as pool:
        waiting = {
            task: [
                pool.submit(run_cases, task, list(range(start, args.cases, args.workers)), args)
                for start in range(args.workers)
            ]
            for task in args.tasks
        }
        for task, parts in waiting.items():
            rows = [row for part in parts for row in part.result()[0]]
            digests[task] = dict(sorted(item for part in parts for item in part.result()[1].items()))
            names = dict.fromkeys(name for row in rows for name in row)
            mean = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
            if training:
                near = np.array([training.psnr(case.result) for case in cases(task, args.cases)])
                mean["nearest"], mean["in_training"] = float(np.median(near)), float((near >= SAME_PICTURE).mean())
            results[task] = {name: round(value, 4) for name, value in mean.items()}
            print(task, results[task], flush=True)
    result = {**made, "tasks": results}
    if args.digests:
        args.digests.write_text(json.dumps(digests, indent=1) + "\n")
    if args.write:
        write(args.write, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
