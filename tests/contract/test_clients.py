"""Published clients, unchanged, against the service: `make test-clients` installs them in `build/clients` and runs this.

The official Python client of OpenAI is in `test_openai_dialect.py`.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.serving import Served, opened, png

from limner import Pipeline

pytestmark = pytest.mark.clients
SCRIPTS = Path(__file__).parent / "clients"
BUILD = Path(__file__).parents[2] / "build" / "clients"
WHY = "is not installed; make test-clients installs it in build/clients"


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(Pipeline.from_pretrained(tiny_folder), tmp_path_factory.mktemp("programs") / "data") as served:
        yield served


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A picture, and a mask whose left half is to be drawn."""
    mask, buffer = Image.new("RGBA", (80, 64), (0, 0, 0, 255)), io.BytesIO()
    mask.paste((0, 0, 0, 0), (0, 0, 40, 64))
    mask.save(buffer, "PNG")
    first, second = tmp_path / "first.png", tmp_path / "mask.png"
    first.write_bytes(png(80, 64))
    second.write_bytes(buffer.getvalue())
    return first, second


def run(*command: str | Path) -> dict[str, Any]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def node(script: str, *arguments: str | Path) -> dict[str, Any]:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (BUILD / "node_modules").is_dir():
        pytest.skip(f"{script} needs npm packages: what it runs {WHY}")
    copy = BUILD / script
    copy.write_text((SCRIPTS / script).read_text())  # beside the packages, where node looks for them
    return run("node", copy, *arguments)


def sizes(pictures: list[str]) -> list[tuple[int, int]]:
    return [opened(base64.b64decode(one)).size for one in pictures]


def test_openai_for_node(served: Served, files: tuple[Path, Path]) -> None:
    found = node("openai.mjs", served.url, *files)
    assert found["generate"]["size"] == "64x80"
    assert sizes(found["generate"]["pictures"]) == [(64, 80)] * 2
    assert sizes(found["edit"]["pictures"]) == [(80, 64)]
    assert found["edit"]["references"] == 2
    (masked,) = (opened(base64.b64decode(one)) for one in found["mask"]["pictures"])
    box = (40, 0, 80, 64)
    assert masked.crop(box).tobytes() == opened(files[0].read_bytes()).convert("RGB").crop(box).tobytes()
    assert found["events"][-1] == "image_generation.completed"
    assert "flux-2-klein-9b" in found["models"]
    assert found["error"] == {"status": 400, "param": "size"}


def test_ai_sdk(served: Served, files: tuple[Path, Path]) -> None:
    found = node("ai_sdk.mjs", served.url, *files)
    assert sizes(found["size"]) == [(64, 80)]
    ((width, height),) = sizes(found["aspect"])
    assert abs(width / height - 16 / 9) < 0.1
    assert sizes(found["options"]) == [(64, 64)]
    assert sizes(found["edit"]) == [(80, 64)]
    assert sizes(found["openai"]) == [(64, 64)] * 2
    assert sizes(found["openai edit"]) == [(80, 64)]
    assert sizes(found["compatible"]) == [(80, 64)]


def test_litellm(served: Served, files: tuple[Path, Path]) -> None:
    python = BUILD / "litellm" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"LiteLLM {WHY}")
    found = run(python, SCRIPTS / "litellm_images.py", served.url, files[0])
    assert sizes(found["generate"]) == [(64, 80)]
    assert sizes(found["own name"]) == [(64, 64)] * 2
    assert sizes(found["edit"]) == [(80, 64)]
