"""The recipe of the bundled model: the whole of it in miniature, exact resumption, and the judge that scores pictures."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from limner import Pipeline

RECIPE = Path(__file__).parents[2] / "recipes" / "stickers"
FONT = RECIPE / "build" / "NotoColorEmoji.ttf"
needs_font = pytest.mark.skipif(not FONT.is_file(), reason="the emoji font is not here; make it with run.sh font")


@pytest.fixture(scope="module", autouse=True)
def _recipe_on_path() -> Iterator[None]:
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


def run(*words: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=RECIPE,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that `run.sh` makes, with a few steps of each part."""
    folder = tmp_path_factory.mktemp("recipe")
    out = run(
        "bash",
        "run.sh",
        BUILD=str(folder / "build"),
        ASSETS=str(folder / "assets"),
        VAE_ARGS="--steps 24 --batch 8 --statistics 32",
        REFINE_ARGS="--steps 12 --batch 4 --statistics 32",
        DATA_ARGS="--sittings 40 --pool 30 --validation 1",
        TRAIN_ARGS="--steps 24 --batch 16 --lr 4e-3 --validate-every 24",
        EVAL_ARGS="--cases 1 --nearest 40 --pool 30 --workers 1",
    )
    (folder / "result.json").write_text(out.splitlines()[-1])
    return folder


@needs_font
@pytest.mark.recipe
def test_the_whole_recipe_in_miniature(made: Path) -> None:
    """Losses fall, the result loads as a model, and the evaluation ends in its JSON."""
    vae = [row["mse"] for row in rows(made / "build" / "vae" / "log.jsonl") if "mse" in row]
    assert vae[-1] < 0.8 * vae[0]
    before, after = (row["psnr"] for row in rows(made / "build" / "refined" / "log.jsonl") if "psnr" in row)
    assert after > before
    losses = [row for row in rows(made / "build" / "model" / "log.jsonl") if "loss" in row]
    assert np.mean([row["loss"] for row in losses[-4:]]) < 0.9 * np.mean([row["loss"] for row in losses[:4]])
    result = json.loads((made / "result.json").read_text())
    tasks = {"draw", "edit", "combine2", "combine3", "combine4", "held_out"}
    assert set(result["tasks"]) == tasks | {"mask", "outpaint", "preserve"}
    assert {"psnr", "ssim", "success", "copy", "nearest"} <= set(result["tasks"]["edit"])
    pipe = Pipeline.from_pretrained(made / "assets" / "stickers")
    assert pipe.latent_preview is not None
    assert pipe("a cat on a beach").images[0].size == (128, 128)


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold equal bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@needs_font
@pytest.mark.recipe
def test_a_resumed_training_is_the_same_training(made: Path, tmp_path: Path) -> None:
    """Stopped after 3 of 6 steps and resumed: equal bits of weights, averages and optimizer, and of what is exported."""
    data = made / "build" / "data" / "data.pt"
    common = (sys.executable, "train.py", "--data", data, "--steps", 6, "--batch", 8, "--validate-every", 4)
    run(*common, "--out", tmp_path / "straight")
    run(*common, "--out", tmp_path / "stopped", "--stop-after", 3)
    run(*common, "--out", tmp_path / "stopped", "--resume")
    for file in ("checkpoint.pt", "best.pt"):
        straight, stopped = (torch.load(tmp_path / name / file, weights_only=True) for name in ("straight", "stopped"))
        assert same(straight, stopped)


def test_a_blend_lies_between_a_run_and_the_weights_before_it(tmp_path: Path) -> None:
    """Each part at its own share of the way; a share of 0 is the folder's weights, bit for bit, and 1 the run's."""
    from export import blend
    from train import Model

    torch.manual_seed(0)
    before, run = (Model(300, pad=0) for _ in range(2))
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / part).mkdir()
        state = {n: p.detach() for n, p in getattr(before, part).named_parameters()}
        save_file(state, tmp_path / part / f"{name}.safetensors")
    for share, text_share in ((0.7, 0.0), (1.0, 0.25)):
        mixed = copy.deepcopy(run)
        blend(mixed, tmp_path, share=share, text_share=text_share)
        for (name, a), b, found in zip(before.named_parameters(), run.parameters(), mixed.parameters(), strict=True):
            along = text_share if name.startswith("text_encoder") else share
            torch.testing.assert_close(found, (1 - along) * a + along * b)
            if along in (0, 1):
                assert torch.equal(found, b if along else a)


@needs_font
@pytest.mark.parametrize("kept", [("--keep-latents", 0.003), ("--freeze-encoder",)])
@pytest.mark.recipe
def test_a_resumed_autoencoder_is_the_same_autoencoder(made: Path, tmp_path: Path, kept: tuple[object, ...]) -> None:
    """And every weight that is trained moves: an optimizer that steps on copies would leave the convolutions where they were."""
    start = made / "build" / "vae" / "vae"
    common = (sys.executable, "refine_autoencoder.py", "--vae", start, "--steps", 4, "--batch", 2, *kept)
    run(*common, "--out", tmp_path / "straight")
    run(*common, "--out", tmp_path / "stopped", "--stop-after", 2)
    run(*common, "--out", tmp_path / "stopped", "--resume")
    straight, stopped = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("straight", "stopped")
    )
    assert same(straight, stopped)
    before = load_file(start / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "straight" / "vae" / "diffusion_pytorch_model.safetensors")
    frozen = {"encoder", "quant_conv"} if "--freeze-encoder" in kept else set()
    for name, value in before.items():
        if not name.startswith("bn."):
            assert torch.equal(value, after[name]) == (name.partition(".")[0] in frozen), name


def plain(prompt: str) -> str:
    """A prompt without the "please" that may stand before or after it."""
    return prompt.removeprefix("please ").removesuffix(" please").removesuffix(", please").removesuffix(",")


def test_prompts_of_the_evaluation_are_never_trained_on() -> None:
    from tasks import TASKS, Grammar, is_evaluation_pair
    from world import HELD_OUT, STICKERS

    glyphs, rng = [*STICKERS.values()], random.Random(0)
    kept, trained = Grammar(glyphs, evaluation=True), Grammar(glyphs, pool=200)
    for task in TASKS:
        asked = {plain(kept.draw(rng, task).prompt) for _ in range(200)}
        sittings = [trained.sitting(rng, task, 4) for _ in range(200)]
        assert not asked & {plain(e.prompt) for sitting in sittings for e in sitting}
        if task == "edit":
            for sitting in sittings:
                for e in sitting:
                    if e.result.scene.name != e.references[0].scene.name:
                        assert not is_evaluation_pair(e.result.stickers[0].glyph, e.result.scene.name)
        if task == "draw":
            kept_pairs, trained_pairs = (
                {(e.result.stickers[0].glyph, e.result.scene.name) for e in some}
                for some in ([kept.draw(rng, task) for _ in range(300)], [e for s in sittings for e in s])
            )
            assert not kept_pairs & trained_pairs
        for sitting in sittings:
            assert len({e.references for e in sitting}) == 1
            shown = {s.glyph for e in sitting for p in (*e.references, e.result) for s in p.stickers}
            assert not shown & set(HELD_OUT.values())


def test_the_world_is_large_enough() -> None:
    from world import HELD_OUT, STICKERS

    assert len(STICKERS) >= 60
    assert len(HELD_OUT) >= 12
    assert not set(STICKERS.values()) & set(HELD_OUT.values())


def test_the_card_says_what_the_model_knows() -> None:
    from world import HELD_OUT, PLACES, PLAIN, STICKERS

    card = " ".join((RECIPE / "model-card.md").read_text().split())
    assert f"{len(STICKERS)} stickers by name: {', '.join(STICKERS)}." in card
    assert f"{len(HELD_OUT)} are kept for the evaluation" in card
    assert f"Scenes: {', '.join(PLACES)}; plain {', '.join(PLAIN)};" in card


@needs_font
def test_the_judge_accepts_the_truth_and_names_what_is_wrong() -> None:
    from judge import judge
    from world import HELD_OUT, STICKERS, Picture, Renderer, Scene, Sticker

    renderer = Renderer(FONT)
    cat = Sticker(glyph=STICKERS["fox"], column="left", row="top")
    truth = Picture(scene=Scene(name="beach", variant=3), stickers=(cat, Sticker(glyph=HELD_OUT["duck"], scale=32)))

    def verdict(picture: Picture) -> Any:
        return judge(renderer.render(picture), truth, references=(), renderer=renderer)

    right = verdict(truth)
    assert right.success
    assert right.psnr == 100
    assert right.ssim == pytest.approx(1)
    wrong = {
        "sticker": truth.with_sticker(0, glyph=STICKERS["dog"]),
        "place": truth.with_sticker(0, column="right"),
        "form": truth.with_sticker(1, mirrored=True),
        "scene": replace(truth, scene=Scene(name="forest")),
    }
    for thing, picture in wrong.items():
        found = verdict(picture)
        assert not getattr(found, thing), thing
        assert not found.success
    assert not verdict(replace(truth, stickers=truth.stickers[:1])).sticker
    blurred = renderer.render(truth).resize((32, 32)).resize((128, 128))
    assert judge(blurred, truth, references=(), renderer=renderer).success


_RENDER = """
import sys
import world
picture = world.Picture(
    scene=world.Scene(name=sys.argv[2], variant=3),
    stickers=(world.Sticker(glyph=world.STICKERS["fox"], scale=world.LARGE, column="right", row="top"),),
    size=world.SIZES[1],
)
assert all(side % world.TOKEN == 0 for side in (*picture.stickers[0].box(picture.size), picture.stickers[0].scale))
world.Renderer(world.Path("build/NotoColorEmoji.ttf")).render(picture).save(sys.argv[1])
"""


@needs_font
@pytest.mark.parametrize("scene", ["beach", "room", "night sky", "city", "forest"])
def test_a_world_of_twice_the_size_shows_the_same(scene: str, tmp_path: Path) -> None:
    from judge import pixels, psnr

    shown = []
    for zoom in ("1", "2"):
        run(sys.executable, "-c", _RENDER, tmp_path / f"{zoom}.png", scene, ZOOM=zoom)
        shown.append(Image.open(tmp_path / f"{zoom}.png"))
    small, large = shown
    assert large.size == (320, 192)
    shrunk = psnr(pixels(large.resize(small.size, Image.Resampling.LANCZOS)), pixels(small))
    assert shrunk > 33
    enlarged = psnr(pixels(small.resize(large.size, Image.Resampling.LANCZOS)), pixels(large))
    assert enlarged < shrunk - 3  # there is more to see


@needs_font
def test_the_judge_sees_a_sticker_that_was_not_removed() -> None:
    from judge import judge
    from world import STICKERS, Picture, Renderer, Scene, Sticker

    renderer = Renderer(FONT)
    before = Picture(scene=Scene(name="room"), stickers=(Sticker(glyph=STICKERS["bus"]),))
    truth = replace(before, stickers=())
    assert judge(renderer.render(truth), truth, references=(before,), renderer=renderer).success
    assert not judge(renderer.render(before), truth, references=(before,), renderer=renderer).sticker


@needs_font
def test_the_judge_sees_a_sticker_too_many() -> None:
    """One that was to move and stands in both places; one that came along with the background of its picture."""
    from judge import judge
    from world import STICKERS, Picture, Renderer, Scene, Sticker

    renderer = Renderer(FONT)
    bus, tree = Sticker(glyph=STICKERS["bus"]), Sticker(glyph=STICKERS["tree"], column="right", row="top")
    room, snow = Picture(scene=Scene(name="room"), stickers=(bus,)), Picture(scene=Scene(name="snow"), stickers=(tree,))
    moved, behind = room.with_sticker(0, column="left"), replace(room, scene=snow.scene)
    for truth, references, extra in ((moved, (room,), bus), (behind, (room, snow), tree)):
        assert judge(renderer.render(truth), truth, references=references, renderer=renderer).success
        wrong = renderer.render(replace(truth, stickers=(*truth.stickers, extra)))
        assert not judge(wrong, truth, references=references, renderer=renderer).sticker


def test_pictures_of_cases_are_those_of_the_recipe() -> None:
    """The files beside the quality tests are what `evaluate.py --save-cases` writes today."""
    if not FONT.is_file():
        pytest.skip("the emoji font is not here; make it with run.sh font")
    from evaluate import TASKS, cases
    from world import Renderer

    folder = Path(__file__).parents[1] / "quality" / "cases"
    saved = json.loads((folder / "cases.json").read_text())
    renderer = Renderer(FONT)
    for task in TASKS:
        for number, case in enumerate(cases(task, 4)):
            row = saved[TASKS.index(task) * 4 + number]
            assert (row["task"], row["prompt"]) == (task, case.prompt)
            with Image.open(folder / row["truth"]) as truth:
                assert np.array_equal(np.asarray(truth), np.asarray(renderer.render(case.result)))


@needs_font
def test_forms_that_can_be_told() -> None:
    """A panda has no colour to lose and a robot no other side; a koala has both, if little colour."""
    from judge import told_forms
    from world import STICKERS, Picture, Renderer, Scene, Sticker

    renderer, beach = Renderer(FONT), Scene(name="beach")
    for name, changes in {"panda": ["mirrored"], "robot": ["grey"], "koala": ["mirrored", "grey"]}.items():
        picture = Picture(scene=beach, stickers=(Sticker(glyph=STICKERS[name]),))
        found = [form.stickers[0] for form in told_forms(picture, 0, renderer)]
        assert [next(c for c in ("mirrored", "grey") if getattr(sticker, c)) for sticker in found] == changes


@needs_font
def test_the_autoencoder_pays_for_a_sticker_that_lost_its_form() -> None:
    from refine_autoencoder import batch, strayed
    from world import STICKERS, Renderer

    some = batch(random.Random(0), Renderer(FONT), [*STICKERS.values()], 3)
    error = torch.zeros_like(some.x)
    assert strayed(error, some).count_nonzero() == 0
    error[some.numbers[0]] = some.ways[0]  # the picture of the other form in place of the right one
    found = strayed(error, some)
    assert found[0] == pytest.approx(1)
    assert found[some.numbers != some.numbers[0]].count_nonzero() == 0
    error[some.numbers[0]] = -some.ways[0]
    assert strayed(error, some)[0] == pytest.approx(-1)


@needs_font
@pytest.mark.recipe
def test_the_transformer_pays_for_a_sticker_that_lost_its_form(made: Path) -> None:
    from train import Batches, strayed

    data = torch.load(made / "build" / "data" / "data.pt", weights_only=True)
    sittings = [s for s in data["sittings"] if s["task"] == "combine3" and s["size"] == (128, 128)]
    batch, cost = Batches(data).collect(sittings[:1]), data["pixel_cost"]
    mirrored, grey = (form - batch["result"] for form in batch["forms"])
    of_mirrored, of_grey = (owners.amax(1).sum() for owners in batch["owners"].unbind(1))
    assert of_mirrored > 0
    assert of_grey > 0
    found = strayed(mirrored, batch, cost)
    whole = len(strayed(torch.zeros_like(mirrored), batch, cost))
    num_mirrored = sum(len(set(row.tolist()) - {0}) for row in batch["owners"][:, 0])
    assert len(found) == whole
    assert torch.allclose(found[:num_mirrored], torch.ones(num_mirrored), atol=1e-5)
    assert torch.allclose(strayed(grey, batch, cost)[num_mirrored:], torch.ones(whole - num_mirrored), atol=1e-5)
    nobody = (batch["owners"] == 0).all(1)  # an error of the scene is none of form
    assert strayed(mirrored * nobody[..., None], batch, cost).abs().max() == 0


def training_set(*sizes: tuple[int, int], value: float) -> dict[str, Any]:
    """A set whose pictures have tokens of value, value + 1, ..., one sitting of two examples and one reference a size."""
    sittings = [
        {
            "task": "edit",
            "size": size,
            "reference_sizes": [sizes[0]],
            "references": [0],
            "results": [1, 2],
            "forms": [[1, 1], [2, 2]],
            "owners": torch.zeros(2, 2, 1, dtype=torch.int8),
            "prompts": [2 * i, 2 * i + 1],
        }
        for i, size in enumerate(sizes)
    ]
    tokens = {size: torch.arange(3.0).add(value).reshape(3, 1, 1) for size in sizes}
    ids = torch.full((2 * len(sizes), 1), value, dtype=torch.int16)
    validation = copy.deepcopy(sittings)
    one = {"sittings": sittings, "validation": validation, "tokens": tokens, "ids": ids, "mask": ids > 0}
    return {**one, "vocabulary": 400}


def test_joined_sets_keep_what_belongs_together() -> None:
    from train import Batches, joined

    large, small = (256, 256), (128, 128)
    found = joined(
        [training_set(large, value=100), training_set(large, value=200), training_set(small, large, value=300)]
    )
    batches = Batches(found)
    for i, (value, size) in enumerate(((100, large), (200, large), (300, small), (300, large))):
        batch = batches.collect([found["sittings"][i]])
        assert batch["size"] == size
        assert batch["result"].flatten().tolist() == [value + 1, value + 2]
        assert [form.flatten().tolist() for form in batch["forms"]] == [[value + 1, value + 2]] * 2
        assert batch["references"][0].item() == value
        assert batch["ids"].flatten().tolist() == [value] * 2
    assert {task: len(some) for task, some in batches.validation().items()} == {"edit": 1, "small_edit": 1}
    with pytest.raises(SystemExit, match="set 2 differs from the first in the tokenizer"):
        joined([training_set(large, value=1), {**training_set(large, value=1), "vocabulary": 401}])


@needs_font
def test_tokens_know_their_sticker() -> None:
    """A sticker of 48 pixels owns 3x3 tokens, where its mirror image and its grey one differ from it."""
    from common import Log
    from prepare import Pictures
    from world import STICKERS, Picture, Renderer, Scene, Sticker

    class Quiet(Log):
        def __init__(self) -> None:
            pass

    pictures = Pictures(None, Renderer(FONT), Quiet())
    stickers = (
        Sticker(glyph=STICKERS["robot"], column="center", row="top"),
        Sticker(glyph=STICKERS["fox"], scale=32, column="right", row="bottom"),
    )
    numbers, owners = pictures.forms(Picture(scene=Scene(name="beach"), stickers=stickers))
    assert len(set(numbers)) == 2
    mirrored, grey = owners.view(2, 8, 8)
    assert (grey[:3, 2:5] == 1).all()
    assert (grey[6:, 6:] == 2).all()
    assert grey.count_nonzero() == 13
    assert (mirrored[6:, 6:] == 2).all()
    assert mirrored.count_nonzero() == 4  # a robot looks straight ahead


def test_results_of_two_models_are_not_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    row = {"psnr": 30.0, "ssim": 0.9, "copy": 10.0}
    row |= dict.fromkeys(("success", "sticker", "place", "form", "scene"), 1.0)
    card, file = tmp_path / "card.md", tmp_path / "evaluation.json"
    card.write_text("\n".join([*evaluate.MARKS, "between", *evaluate.CONTROL_MARKS]) + "\n")
    monkeypatch.setattr(evaluate, "CARD", card)
    made = {"cases": 2, "steps": 4, "model": "a", "dtype": "float32", "quantize": None, "kv_cache_dtype": None}
    evaluate.write(file, {**made, "tasks": {"draw": row | {"nearest": 20.0}, "preserve": row | {"untouched": 35.0}}})
    evaluate.write(file, {**made, "tasks": {"draw": row | {"psnr": 31.0}, "edit": row | {"untouched": 33.0}}})
    tasks = json.loads(file.read_text())["tasks"]
    assert [*tasks] == ["draw", "edit", "preserve"]
    assert tasks["draw"] == row | {"psnr": 31.0, "nearest": 20.0}  # what was not measured again stays
    text = card.read_text()
    assert "between" in text
    assert "| edit | all pixels that should stay, without `preserve` | 33.0 dB |" in text
    assert "| preserve | all pixels that should stay | 35.0 dB |" in text
    before = file.read_text()
    for name, value in (
        ("model", "b"),
        ("dtype", "bfloat16"),
        ("quantize", "int8"),
        ("kv_cache_dtype", "int8"),
        ("cases", 3),
    ):
        with pytest.raises(ValueError, match=rf"has edit, preserve made otherwise \({name} .*, now {value}\)"):
            evaluate.write(file, {**made, name: value, "tasks": {"draw": row}})
    assert file.read_text() == before
    evaluate.write(file, {**made, "model": "b", "tasks": {"draw": row, "edit": row, "preserve": row}})
    assert json.loads(file.read_text()) == {**made, "model": "b", "tasks": {"draw": row, "edit": row, "preserve": row}}


@needs_font
def test_cases_that_keep_a_part_know_what_stays() -> None:
    from common import find_font
    from controls import CONTROLS, control_cases
    from evaluate import cases
    from world import Renderer

    renderer = Renderer(find_font())
    for task in CONTROLS:
        found = control_cases(task, 12)
        assert found == control_cases(task, 12)
        for case in found:
            given, truth = case.arguments(renderer), renderer.render(case.result)
            for name, value in case.kept(truth, renderer).items():
                if name != "continued":  # the edges drawn out, which no truth is
                    assert value == (0 if name == "changed_outside" else 100), (task, name)
            if task == "outpaint":
                left, top, right, bottom = given["expand"]
                (kept,) = given["image"]
                assert (kept.width + left + right, kept.height + top + bottom) == truth.size
                assert kept.tobytes() == truth.crop((left, top, truth.width - right, truth.height - bottom)).tobytes()
            else:
                grey = Image.new("RGB", truth.size, "grey")
                assert all(
                    value != (0 if name == "changed_outside" else 100)
                    for name, value in case.kept(grey, renderer).items()
                )
    edits = [(case.prompt, case.references, case.result) for case in cases("edit", 8)]
    assert [(case.prompt, case.references, case.result) for case in cases("preserve", 8)] == edits
