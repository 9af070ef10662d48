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
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A picture, and masks whose left half is to be drawn: transparent there, or white."""
    mask, buffer = Image.new("RGBA", (80, 64), (0, 0, 0, 255)), io.BytesIO()
    mask.paste((0, 0, 0, 0), (0, 0, 40, 64))
    mask.save(buffer, "PNG")
    first, second, third = (tmp_path / f"{name}.png" for name in ("first", "mask", "white"))
    first.write_bytes(png(80, 64))
    second.write_bytes(buffer.getvalue())
    mask.getchannel("A").point(lambda alpha: 255 - alpha).save(third)
    return first, second, third


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


def check_masked(pictures: list[str], first: Path, *, edge: int) -> None:
    """From the edge on pixels are those of the file; the left half is drawn."""
    (found,) = (opened(base64.b64decode(one)).convert("RGB") for one in pictures)
    kept = opened(first.read_bytes()).convert("RGB")
    assert found.crop((edge, 0, 80, 64)).tobytes() == kept.crop((edge, 0, 80, 64)).tobytes()
    assert found.crop((0, 0, 40, 64)).tobytes() != kept.crop((0, 0, 40, 64)).tobytes()


def test_openai_for_node(served: Served, files: tuple[Path, Path, Path]) -> None:
    found = node("openai.mjs", served.url, *files[:2])
    assert found["generate"]["size"] == "64x80"
    assert sizes(found["generate"]["pictures"]) == [(64, 80)] * 2
    assert sizes(found["edit"]["pictures"]) == [(80, 64)]
    assert found["edit"]["references"] == 2
    check_masked(found["mask"]["pictures"], files[0], edge=40)  # mask_blur: 0
    assert found["mask"]["canvas"]["size"] == [80, 64]
    assert found["events"][-1] == "image_generation.completed"
    assert "flux-2-klein-9b" in found["models"]
    assert found["error"] == {"status": 400, "param": "size"}


def test_ai_sdk(served: Served, files: tuple[Path, Path, Path]) -> None:
    found = node("ai_sdk.mjs", served.url, *files)
    assert sizes(found["size"]) == [(64, 80)]
    ((width, height),) = sizes(found["aspect"])
    assert abs(width / height - 16 / 9) < 0.1
    assert sizes(found["options"]) == [(64, 64)]
    assert sizes(found["edit"]) == [(80, 64)]
    check_masked(found["mask"], files[0], edge=48)
    assert sizes(found["openai"]) == [(64, 64)] * 2
    check_masked(found["openai edit"], files[0], edge=48)
    assert sizes(found["compatible"]) == [(80, 64)]


def test_litellm(served: Served, files: tuple[Path, Path, Path]) -> None:
    python = BUILD / "litellm" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"LiteLLM {WHY}")
    found = run(python, SCRIPTS / "litellm_images.py", served.url, files[0])
    assert sizes(found["generate"]) == [(64, 80)]
    assert sizes(found["own name"]) == [(64, 64)] * 2
    assert sizes(found["edit"]) == [(80, 64)]
