"""The node pack in ComfyUI's interface: K/V stay between prompts, and never are those of anything else."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.support.comfyui import PACK, Executor, Host, Interrupted, Prompt, load_pack, sockets
from tests.support.lora_files import make_pairs, original
from tests.support.tiny import generators, picture

import limner
from limner import CapacityError, InvalidRequest, Pipeline, References

NODES = load_pack().NODE_CLASS_MAPPINGS
SOCKETS = {"LIMNER_MODEL", "LIMNER_REFERENCES", "IMAGE", "MASK", "STRING", "INT", "FLOAT", "BOOLEAN"}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def comfy(host: Host) -> Executor:
    picture(96, 70).save(host.folder / "a.png")
    picture(64, 80, seed=1).save(host.folder / "b.png")
    for seed in (1, 2):
        save_file(original(make_pairs(seed)), host.folder / "loras" / f"{seed}.safetensors")
    for file in host.folder.rglob("*.*"):
        settle(file)
    return Executor()


def settle(file: Path) -> None:
    """Let a file be older than what might still change; its other time is set by this."""
    os.utime(file, (1_700_000_000, 1_700_000_000))


@pytest.fixture(autouse=True)
def _ctime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once: the tests replace them, which gives them another inode."""
    monkeypatch.setattr("limner.weights.digest._SETTLED", -1e9)


def graph(host: Host, model: Path, **changes: Any) -> Prompt:
    """Load a model, make references of a.png and b.png, and edit."""
    edit = {"prompt": "red", "seed": 3, "steps": 2, "width": 0, "height": 0, "batch_size": 1} | changes
    return {
        "model": node("LimnerLoadModel", model="bundled", path=str(model)),
        "a": node("LoadImage", image=str(host.folder / "a.png")),
        "b": node("LoadImage", image=str(host.folder / "b.png")),
        "refs": node("LimnerReferences", model=["model", 0], image_1=["a", 0], image_2=["b", 0]),
        "edit": node("LimnerEdit", model=["model", 0], references=["refs", 0], **edit),
    }


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def with_lora(prompt: Prompt, name: str, strength: float = 1.0, *, of: tuple[str, ...] = ("refs", "edit")) -> Prompt:
    """Put a LoRA between the model and these nodes."""
    changed = {id: {**one, "inputs": dict(one["inputs"])} for id, one in prompt.items()}
    changed["lora"] = node("LimnerLoadLora", model=["model", 0], lora=name, strength=strength)
    for id in of:
        changed[id]["inputs"]["model"] = ["lora", 0]
    return changed


def image(comfy: Executor, prompt: Prompt, end: str = "edit") -> np.ndarray:
    ((pixels, *_),) = comfy.run(prompt, end)
    return np.asarray(pixels)


def expected(
    model: Path, host: Host, *names: str, seed: int = 3, lora: str | None = None, strength: float = 1.0, **more: Any
) -> np.ndarray:
    """What a pipeline of its own draws, that has drawn nothing before."""
    pipe = Pipeline.from_pretrained(model)
    if lora is not None:
        pipe.load_lora_weights(host.folder / "loras" / lora, "one")
        pipe.set_adapters(["one"], [strength])
    asked = {"prompt": "red", "num_inference_steps": 2} | more
    images = [host.folder / name for name in names] or None
    return np.asarray(pipe(image=images, generator=generators(seed), output_type="np", **asked).images)


@pytest.mark.parametrize("name", NODES)
def test_nodes_have_the_documented_interface(name: str, host: Host) -> None:
    kind = NODES[name]
    types = kind.INPUT_TYPES()
    assert set(types) <= {"required", "optional"}
    for _, socket in sockets(types):
        assert isinstance(socket, list) or socket in SOCKETS
    assert isinstance(kind.RETURN_TYPES, tuple)
    assert set(kind.RETURN_TYPES) <= SOCKETS
    assert len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES)
    assert kind.CATEGORY == "Limner"
    assert kind.DESCRIPTION
    method = inspect.signature(getattr(kind(), kind.FUNCTION))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in method.parameters.values())
    assert takes_all or {one for one, _ in sockets(types)} == set(method.parameters)
    validated = inspect.getfullargspec(kind.VALIDATE_INPUTS).args[1:] if hasattr(kind, "VALIDATE_INPUTS") else []
    assert set(validated) <= {one for one, _ in sockets(types)}


def test_the_pack_names_each_node_and_itself() -> None:
    assert set(load_pack().NODE_DISPLAY_NAME_MAPPINGS) == set(NODES)
    about = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert about["project"]["version"] == limner.__version__
    assert set(about["tool"]["comfy"]) >= {"PublisherId", "DisplayName"}
    text = (PACK / "README.md").read_text()
    for title in load_pack().NODE_DISPLAY_NAME_MAPPINGS.values():
        assert f"| {title} |" in text


def test_another_prompt_computes_no_references_and_draws_the_same(
    comfy: Executor, host: Host, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = []
    prefill = limner.model.transformer.Transformer.prefill
    monkeypatch.setattr(
        limner.model.transformer.Transformer,
        "prefill",
        lambda self, *given, **options: prefills.append(1) or prefill(self, *given, **options),
    )
    first = image(comfy, graph(host, tiny_folder))
    assert comfy.ran == ["model", "a", "b", "refs", "edit"]
    second = image(comfy, graph(host, tiny_folder, prompt="blue", seed=4))
    assert comfy.ran == ["edit"]
    assert len(prefills) == 1
    assert np.array_equal(first, expected(tiny_folder, host, "a.png", "b.png"))
    assert np.array_equal(second, expected(tiny_folder, host, "a.png", "b.png", prompt="blue", seed=4))
    image(comfy, graph(host, tiny_folder, prompt="blue", seed=4))
    assert comfy.ran == []


def test_a_changed_picture_is_never_the_last_one(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    first = image(comfy, graph(host, tiny_folder))
    shutil.copy(host.folder / "a.png", host.folder / "kept.png")
    picture(96, 70, seed=9).save(host.folder / "a.png")
    second = image(comfy, graph(host, tiny_folder))
    assert comfy.ran == ["a", "refs", "edit"]
    assert np.array_equal(second, expected(tiny_folder, host, "a.png", "b.png"))
    assert not np.array_equal(second, first)
    shutil.copy(host.folder / "kept.png", host.folder / "a.png")
    assert np.array_equal(image(comfy, graph(host, tiny_folder)), first)
    swapped = graph(host, tiny_folder)
    swapped["refs"]["inputs"] |= {"image_1": ["b", 0], "image_2": ["a", 0]}
    assert np.array_equal(image(comfy, swapped), expected(tiny_folder, host, "b.png", "a.png"))


def test_loras_act_where_they_are_and_nowhere_else(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    """Strengths, taking a LoRA away, a file that is replaced, and two branches of one prompt."""
    plain = graph(host, tiny_folder)
    bare = expected(tiny_folder, host, "a.png", "b.png")
    assert np.array_equal(image(comfy, plain), bare)
    for name, strength in (("1.safetensors", 1.0), ("1.safetensors", 0.5), ("2.safetensors", 0.5)):
        found = image(comfy, with_lora(plain, name, strength))
        assert comfy.ran == ["lora", "refs", "edit"]
        assert np.array_equal(found, expected(tiny_folder, host, "a.png", "b.png", lora=name, strength=strength))
    assert np.array_equal(image(comfy, plain), bare)

    both = with_lora(plain, "1.safetensors") | {"plain": plain["edit"], "plain refs": plain["refs"]}
    both["plain"] = node("LimnerEdit", **(plain["edit"]["inputs"] | {"references": ["plain refs", 0]}))
    (one, *_), (two, *_) = comfy.run(both, "edit", "plain")
    assert np.array_equal(two, bare)
    styled = expected(tiny_folder, host, "a.png", "b.png", lora="1.safetensors")
    assert np.array_equal(one, styled)

    os.replace(host.folder / "loras" / "2.safetensors", host.folder / "loras" / "1.safetensors")
    found = image(comfy, with_lora(plain, "1.safetensors"))
    assert comfy.ran == ["lora", "refs", "edit"]
    assert not np.array_equal(found, styled)
    assert np.array_equal(found, expected(tiny_folder, host, "a.png", "b.png", lora="1.safetensors"))


def test_references_of_another_model_are_computed_again(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    """Made without the LoRA, used with it: K/V of the bare model would be a silent mistake."""
    found = image(comfy, with_lora(graph(host, tiny_folder), "1.safetensors", of=("edit",)))
    assert np.array_equal(found, expected(tiny_folder, host, "a.png", "b.png", lora="1.safetensors"))
    half = graph(host, tiny_folder, width=64, height=64)
    half["capped"] = node("LimnerLoadModel", model="bundled", path=str(tiny_folder), max_pixels=4096)
    half["edit"]["inputs"]["model"] = ["capped", 0]
    found = image(comfy, half)
    capped = Pipeline.from_pretrained(tiny_folder, reference_policy=limner.ReferencePolicy(max_pixels=4096))
    images = [host.folder / "a.png", host.folder / "b.png"]
    asked = {"image": images, "width": 64, "height": 64, "num_inference_steps": 2, "output_type": "np"}
    out = capped("red", generator=generators(3), **asked)
    assert np.array_equal(found, out.images)


def test_the_same_lora_twice_acts_with_the_sum(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    chained = with_lora(graph(host, tiny_folder), "1.safetensors", 0.25)
    chained["first"] = node("LimnerLoadLora", model=["model", 0], lora="1.safetensors", strength=0.5)
    chained["lora"]["inputs"]["model"] = ["first", 0]
    found = image(comfy, chained)
    assert np.array_equal(found, expected(tiny_folder, host, "a.png", "b.png", lora="1.safetensors", strength=0.75))


def test_a_model_whose_files_change_is_loaded_again(comfy: Executor, host: Host, tiny_copy: Path) -> None:
    first = image(comfy, graph(host, tiny_copy))
    image(comfy, graph(host, tiny_copy, seed=4))
    assert comfy.ran == ["edit"]
    file = tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    tensors = {name: x.flip(0).contiguous() if x.dim() == 2 else x for name, x in load_file(file).items()}
    save_file(tensors, tiny_copy / "new.safetensors", metadata={"format": "pt"})
    os.replace(tiny_copy / "new.safetensors", file)
    second = image(comfy, graph(host, tiny_copy))
    assert comfy.ran == ["model", "refs", "edit"]
    assert not np.array_equal(first, second)
    assert np.array_equal(second, expected(tiny_copy, host, "a.png", "b.png"))


def test_packs_are_saved_loaded_and_told_apart(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    prompt = graph(host, tiny_folder)
    prompt["save"] = node("LimnerSaveReferences", references=["refs", 0], name="cat")
    ((file,), (drawn, *_)) = comfy.run(prompt, "save", "edit")
    assert Path(file) == host.folder / "output" / "limner" / "cat_00001.safetensors"
    loaded = graph(host, tiny_folder)
    loaded["refs"] = node("LimnerLoadReferences", pack="cat_00001.safetensors")
    assert np.array_equal(image(comfy, loaded), drawn)
    assert "cut 0 left, 3 top" in comfy.run(loaded, "refs")[0][1]
    with pytest.raises(InvalidRequest, match="they were made with weights"):
        comfy.run(with_lora(loaded, "1.safetensors", of=("edit",)), "edit")

    pipe = Pipeline.from_pretrained(tiny_folder)
    pipe.prefill(host.folder / "b.png").save(host.folder / "new.safetensors")
    os.replace(host.folder / "new.safetensors", file)
    found = image(comfy, loaded)
    assert comfy.ran[-2:] == ["refs", "edit"]
    assert np.array_equal(found, expected(tiny_folder, host, "b.png"))


def test_saving_writes_nothing_over(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    references = comfy.run(graph(host, tiny_folder), "refs")[0][0]
    saved = [NODES["LimnerSaveReferences"]().save(references, "cat")["result"][0] for _ in range(2)]
    assert [Path(file).name for file in saved] == ["cat_00001.safetensors", "cat_00002.safetensors"]
    assert References.load(saved[1]).key == references.references.key
    for name in ("", "../x", "/x", ".x", "a/b"):
        with pytest.raises(InvalidRequest, match="name: .* is not the name of a file"):
            NODES["LimnerSaveReferences"]().save(references, name)


def test_a_batch_is_pictures_in_order_and_seeds_in_order(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    load = NODES["LimnerLoadModel"]().load(model="bundled", path=str(tiny_folder))[0]
    pictures = [picture(64, 64, seed=i) for i in range(3)]
    batch = torch.stack([torch.from_numpy(np.asarray(p).astype(np.float32) / 255) for p in pictures])
    found, _ = NODES["LimnerReferences"]().make(load, batch[:2], image_3=batch[2:])
    assert [p.data for p in found.pictures] == [p.tobytes() for p in pictures]
    asked = {"prompt": "x", "steps": 1, "width": 64, "height": 64}
    several, report = NODES["LimnerGenerate"]().draw(load, **asked, seed=5, batch_size=2)
    assert several.shape == (2, 64, 64, 3)
    assert '"seeds": [5, 6]' in report
    for i in range(2):
        alone, _ = NODES["LimnerGenerate"]().draw(load, **asked, seed=5 + i, batch_size=1)
        torch.testing.assert_close(several[i], alone[0], atol=1e-5, rtol=0)  # a batch of two sums in another order


def masked(host: Host, model: Path, *, size: tuple[int, int] = (96, 70), **changes: Any) -> Prompt:
    """Edit the left half of a.png, which is off the grid."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 40, size[1]))
    mask.save(host.folder / "mask.png")
    prompt = graph(host, model, mask=["mask", 1], **changes)
    return {**prompt, "mask": node("LoadImage", image=str(host.folder / "mask.png"))}


def test_a_mask_repaints_its_place_and_nothing_else(
    comfy: Executor, host: Host, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed mask computes no references again; outside of it the file's pixels come back through Save Image."""
    prefills: list[int] = []
    prefill = limner.model.transformer.Transformer.prefill
    monkeypatch.setattr(
        limner.model.transformer.Transformer,
        "prefill",
        lambda self, *given, **options: prefills.append(1) or prefill(self, *given, **options),
    )
    kept = np.asarray(Image.open(host.folder / "a.png"))
    prompt = masked(host, tiny_folder, mask_blur=4)
    ((pixels, report),) = comfy.run(prompt, "edit")
    drawn = np.clip(255.0 * pixels.numpy(), 0, 255).astype(np.uint8)[0]  # as Save Image does
    assert drawn.shape == kept.shape
    assert np.array_equal(drawn[:, 44:], kept[:, 44:])
    assert (drawn[:, :40] != kept[:, :40]).any(-1).mean() > 0.9
    assert "canvas 96x70, drawn whole" in report
    host.steps.clear()
    other = image(comfy, masked(host, tiny_folder, strength=0.5, reference_weights="1, 0.5", reference_guidance=1.5))
    assert comfy.ran == ["edit"]
    assert len(prefills) == 1
    assert len(host.steps) == 1  # of two steps half are drawn
    assert not np.array_equal(other[0, :, :40], pixels.numpy()[0, :, :40])


@pytest.mark.parametrize("asked", [{}, {"strength": 0.5}, {"preserve": "auto"}], ids=["alone", "strength", "preserve"])
def test_what_means_nothing_without_a_mask_is_refused(
    comfy: Executor, host: Host, tiny_folder: Path, asked: dict[str, Any]
) -> None:
    for changes in ({"mask_blur": 4}, {"padding_mask_crop": 0}):
        (name, value), *_ = changes.items()
        with pytest.raises(InvalidRequest, match=f"^{name}: {value} needs a mask"):
            comfy.run(graph(host, tiny_folder, **asked, **changes), "edit")


def test_expand_strength_preserve_and_canvas(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    kept = np.asarray(Image.open(host.folder / "a.png"))
    found = image(comfy, graph(host, tiny_folder, expand_left=32))[0]
    assert found.shape == (70, 128, 3)
    assert np.array_equal((found * 255).round()[:, 32 + 16 + 8 :], kept[:, 24:])
    for asked in ({"preserve": "auto"}, {"strength": 0.5}, {"reference_weights": "0 0.5"}):
        assert image(comfy, graph(host, tiny_folder, **asked)).shape[1:3] == (
            (70, 96) if "preserve" in asked else (80, 96) if "strength" in asked else (64, 96)
        )
    found = image(comfy, graph(host, tiny_folder, canvas=["b", 0], preserve="auto"))
    assert found.shape[1:3] == (80, 64)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": (90, 70)}, "mask: is 90x70, the picture 96x70"),
        ({"preserve": "auto"}, "preserve: is for edits without a mask"),
        ({"expand_top": 16}, "expand: .* are both given"),
        ({"reference_weights": "1"}, "reference_weights: there are 1 for 2 references"),
        ({"reference_weights": "a"}, "reference_weights: 'a' is not a number"),
        ({"width": 64}, "width: 64 is not that of the canvas"),
    ],
)
def test_masks_that_cannot_be_followed_are_refused(
    comfy: Executor, host: Host, tiny_folder: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        comfy.run(masked(host, tiny_folder, **changes), "edit")


def test_what_is_missing_for_a_mask_is_said(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    no_mask = graph(host, tiny_folder, mask=["a", 1])
    with pytest.raises(InvalidRequest, match="the loaded file has no mask"):
        comfy.run(no_mask, "edit")
    with pytest.raises(InvalidRequest, match="canvas: is connected, and nothing says"):
        comfy.run(graph(host, tiny_folder, canvas=["a", 0]), "edit")
    pack = masked(host, tiny_folder)
    pack["save"] = node("LimnerSaveReferences", references=["refs", 0], name="cat")
    comfy.run({id: pack[id] for id in ("model", "a", "b", "refs", "save")}, "save")
    del pack["save"]
    pack["refs"] = node("LimnerLoadReferences", pack="cat_00001.safetensors")
    with pytest.raises(InvalidRequest, match="a pack holds no pictures"):
        comfy.run(pack, "edit")


def test_the_stop_button_ends_the_call_and_the_next_one_runs(comfy: Executor, host: Host, tiny_folder: Path) -> None:
    image(comfy, graph(host, tiny_folder))
    assert [step[:2] for step in host.steps] == [(1, 2), (2, 2)]
    host.steps.clear()
    host.stop_at = 3
    with pytest.raises(Interrupted):
        comfy.run(graph(host, tiny_folder, steps=60), "edit")
    assert len(host.steps) == 3
    found = image(comfy, graph(host, tiny_folder, seed=8))
    assert np.array_equal(found, expected(tiny_folder, host, "a.png", "b.png", seed=8))
    host.steps.clear()
    host.stop_at = 0  # pressed before the first step
    with pytest.raises(Interrupted):
        comfy.run(graph(host, tiny_folder, steps=60), "edit")
    assert host.steps == []


def test_comfyuis_models_make_room(
    comfy: Executor, host: Host, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, draw, left = expected(tiny_folder, host, "a.png", "b.png"), Pipeline.draw, [1]

    def scarce(self: Pipeline, *given: Any, **options: Any) -> Any:
        if left and left.pop():
            raise CapacityError("there is no room")
        return draw(self, *given, **options)

    monkeypatch.setattr(Pipeline, "draw", scarce)
    assert np.array_equal(image(comfy, graph(host, tiny_folder)), wanted)
    assert host.unloaded == 1
    left[:] = [1, 1]
    with pytest.raises(CapacityError, match="no room"):
        comfy.run(graph(host, tiny_folder, seed=4), "edit")
    assert host.unloaded == 2


def test_previews_are_shown_where_the_model_has_them(host: Host) -> None:
    model = NODES["LimnerLoadModel"]().load(model="bundled")[0]
    NODES["LimnerGenerate"]().draw(model, prompt="a cat", seed=1, steps=2, width=64, height=64, batch_size=2)
    kind, shown, side = host.steps[0][2]
    assert (kind, shown.size, side) == ("JPEG", (8, 8), 512)
    assert isinstance(shown, Image.Image)


def test_weights_and_references_are_made_outside_of_inference_mode(
    comfy: Executor, host: Host, tiny_folder: Path
) -> None:
    """Tensors made in it count no changes, so that changed weights would go unnoticed."""
    (model,), (refs, _), (pixels, _) = comfy.run(graph(host, tiny_folder), "model", "refs", "edit")
    with model.pipeline() as pipe:
        assert not any(p.is_inference() for p in pipe.transformer.parameters())
    assert not any(x.is_inference() for layer in refs.references.layers for x in layer)
    assert not pixels.is_inference()


def test_parts_and_models_are_chosen_from_comfyuis_folders(host: Host, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, host.folder / "diffusers" / "tiny")
    file = tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, host.folder / "diffusion_models" / "klein.safetensors")
    (host.folder / "diffusion_models" / "notes.txt").touch()
    types = NODES["LimnerLoadModel"].INPUT_TYPES()
    assert types["required"]["model"][0] == ["bundled", "tiny"]
    assert types["optional"]["transformer"][0] == ["of the model", "klein.safetensors"]
    assert types["optional"]["dtype"][0] == ["of the files", "float32", "bfloat16", "float16"]
    whole = NODES["LimnerLoadModel"]().load(model="tiny")[0]
    part = NODES["LimnerLoadModel"]().load(model="tiny", transformer="klein.safetensors", dtype="float32")[0]
    with whole.pipeline() as one, part.pipeline() as two:
        assert one.digest == two.digest


BAD = [
    ({"width": 500}, "width: 500 is not a multiple of 16"),
    ({"prompt": " "}, "prompt: ' ' is empty"),
    ({"steps": -1}, "steps: -1 is beyond the bounds"),
    ({"seed": 2**53}, "seed: 9007199254740992 is beyond"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_wrong_inputs_are_refused_before_anything_runs(
    changes: dict[str, Any], words: str, comfy: Executor, host: Host, tiny_folder: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        comfy.run(graph(host, tiny_folder, **changes), "edit")
    assert comfy.ran == []


def test_what_is_no_picture_is_refused(host: Host, tiny_folder: Path) -> None:
    model = NODES["LimnerLoadModel"]().load(model="bundled", path=str(tiny_folder))[0]
    for bad in (torch.zeros(64, 64, 3), torch.zeros(1, 64, 64, 1), torch.full((1, 64, 64, 3), float("nan"))):
        with pytest.raises(InvalidRequest, match="image_1: "):
            NODES["LimnerReferences"]().make(model, bad)


@pytest.mark.skipif("LIMNER_COMFYUI" not in os.environ, reason="LIMNER_COMFYUI does not name a checkout of ComfyUI")
def test_in_comfyui_itself() -> None:
    """By the Python that $LIMNER_COMFYUI_PYTHON names, in which ComfyUI and limner can be imported."""
    python, script = os.environ.get("LIMNER_COMFYUI_PYTHON", sys.executable), "tests/support/comfyui_runtime.py"
    command = [python, script, "comfyui", os.environ["LIMNER_COMFYUI"]]
    done = subprocess.run(command, cwd=PACK.parents[1], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
