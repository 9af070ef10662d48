"""What README and the guides say is typed as it stands, in a folder where `limner samples` was typed.

Blocks of `sh` and `python` run in this process, those of `bash` and `py` against a server. `text` is not typed: it needs
weights, a cluster or a container that are not here. `make first-hour` types all of README in an environment of its own.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from limner.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDES = [
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "install", "edit", "references", "batch", "memory", "control"))
]
PAGES = {"README": README, **{file.stem: file.read_text() for file in GUIDES}}
SERVED = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("serve", "control")}
SET_UP = ("make ", "pip ", "python3 -m venv")


def blocks(page: str, *kinds: str) -> list[tuple[str, str]]:
    """Return kind and text of the blocks of code of these kinds, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    return [(kind, text) for kind, text in found if kind in kinds]


def commands(text: str) -> list[str]:
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["samples", "samples"]) == 0
    return tmp_path


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command as a shell would: a pipe into its stdin, its output to a file."""
    given, bar, rest = command.rpartition(" | ")
    command, _, target = rest.partition(" > ")
    if bar:
        (text,) = shlex.split(given)[1:]  # echo
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode() + b"\n")))
    words = shlex.split(command, comments=True)
    assert words[0] == "limner", command
    code = main(words[1:])
    shown = capsys.readouterr()
    assert code == 0, f"{command}: {shown.err}"
    if target:
        (folder / target.strip()).write_text(shown.out)
    for option, value in pairwise(words):
        if option == "-o" and not (folder / value).is_dir():
            written = sorted(folder.glob(f"{Path(value).stem}*{Path(value).suffix}"))
            assert len(written) == (2 if "--num-images" in words else 1)
            assert all(file.stat().st_size > 500 for file in written)


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_programs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, text in blocks(PAGES[name], "sh", "python"):
        if kind == "python":
            exec(compile(text, f"{name}.md", "exec"), {"__name__": "__main__"})
            continue
        for command in commands(text):
            if not command.startswith(SET_UP):
                run(command, folder, monkeypatch, capsys)


def test_something_is_typed() -> None:
    assert sum(len(blocks(page, "sh", "python")) for page in PAGES.values()) >= 12


def test_set_up_commands_exist() -> None:
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for _, text in blocks(README, "sh"):
        for line in commands(text):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert set(words[1:]) <= set(targets), line


def test_the_demo_installs_as_the_readme_says(tmp_path: Path) -> None:
    """Torch and Limner by the same words, and nothing more; a folder of wheels (PIP_FIND_LINKS) comes before the index."""
    says = [line for _, text in blocks(README, "sh") for line in commands(text) if line.startswith("pip install")]
    assert says == [line for line in PAGES["install"].splitlines() if line.startswith("pip install -c")]
    variables = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "-n", "demo"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    does = [line for line in done.stdout.splitlines() if "/pip install" in line]
    assert [line.replace(".venv/bin/", "").replace("--disable-pip-version-check ", "") for line in does] == [
        line.replace(" .", " -e .") for line in says
    ]
    assert "'" not in "".join(does)  # no extra


@pytest.mark.parametrize("name", SERVED)
def test_what_needs_a_server(name: str, folder: Path) -> None:
    """The page's programs are typed first: they make files that its requests send."""
    found = blocks(SERVED[name], "bash", "py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for _, text in blocks(SERVED[name], "python"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=folder, timeout=300, check=True)
    words = [sys.executable, "-m", "limner", "serve", "--port", port, "--data", str(folder / "data")]
    log = folder / "log"
    with log.open("w") as opened, subprocess.Popen(words, stderr=opened) as server:
        try:
            for _ in range(600):
                if "limner-stickers at http" in log.read_text():
                    break
                time.sleep(0.1)
            printed = {kind: type_block(kind, text.replace("8731", port), folder) for kind, text in found}
            if name == "serve":
                assert '"num_tokens":128' in printed["bash"]
                events = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
                assert printed["py"].split() == events
                assert (folder / "cat-on-beach.png").stat().st_size > 500
            else:
                assert '"b64_json"' in printed["bash"]
            job = ready(re.findall(r'"polling_url":"(.*?)"', printed["bash"])[0])
            assert job["result"]["sample"].startswith("http")
            if name == "control":
                assert job["result"]["limner"]["canvas"]
        finally:
            server.terminate()
    assert server.returncode == 0


def type_block(kind: str, text: str, folder: Path) -> str:
    """Return what a block prints: one of `bash` in a shell, one of `py` in Python."""
    typed = text.replace("curl -s", "curl -s --fail-with-body --retry-connrefused --retry 20")
    command = ["bash", "-e", "-c", typed] if kind == "bash" else [sys.executable, "-W", "ignore", "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ready(polling_url: str) -> dict[str, Any]:
    """Return the answer about a job that is ready."""
    for _ in range(600):
        with urlopen(polling_url) as answer:
            found: dict[str, Any] = json.load(answer)
        if found["status"] != "Pending":
            break
        time.sleep(0.1)
    assert found["status"] == "Ready", found
    return found


def test_pictures_and_links_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_lines_of_the_readme_are_short() -> None:
    assert [line for line in README.splitlines() if len(line) > 100] == []


def test_the_readme_counts_what_the_bundled_model_knows() -> None:
    folder = ROOT / "src" / "limner" / "assets" / "stickers"
    words = json.loads((folder / "limner.json").read_text())["words"]
    listed = re.search(r"It calls \d+ stickers by name: (.*?)\.", (folder / "README.md").read_text(), re.S)
    assert f"It knows {len(words)} words and {listed[1].count(',') + 1} stickers" in README
