"""What README says is typed as it stands: every shell block but those of set-up and servers, and every Python block."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tests.support.command import run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [
    line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines() if line.strip()
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SERVED = [(kind, text) for kind, text in BLOCKS if kind in ("bash", "py")]
"""Blocks that need `limner serve`."""
SET_UP = (
    "limner deploy ",
    "make ",
    "git ",
    "pip ",
    "python -m venv",
    "python benchmarks/",
    "python recipes/",
    "bash recipes/",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout to what only reads."""
    for name in ("src", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_commands(checkout: Path) -> None:
    commands = [line for line in SHELL if not line.startswith(SET_UP)]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "limner", command
        done = run(*words[1:], cwd=checkout)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        for option, value in pairwise(words):
            if option == "-o":
                written = sorted(checkout.glob(f"{Path(value).stem}*{Path(value).suffix}"))
                assert len(written) == (2 if "--num-images" in words else 1)
                assert all(file.stat().st_size > 500 for file in written)


def test_set_up_commands_exist() -> None:
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in SHELL:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), line
        if words[0] in ("python", "bash") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), line


def test_python(checkout: Path) -> None:
    assert PYTHON
    for program in PYTHON:
        with contextlib.chdir(checkout):
            exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})


def test_what_needs_a_server(checkout: Path, tmp_path: Path) -> None:
    assert {kind for kind, _ in SERVED} == {"bash", "py"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    words = [sys.executable, "-m", "limner", "serve", "--port", port, "--data", str(tmp_path / "data")]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(words, stderr=log) as server:
        try:
            for _ in range(600):
                if "limner-stickers at http" in (tmp_path / "log").read_text():
                    break
                time.sleep(0.1)
            for kind, text in SERVED:
                typed = text.replace("8731", port)
                if kind == "bash":
                    typed = typed.replace("curl -s", "curl -s --fail-with-body --retry-connrefused --retry 20")
                command = (
                    ["bash", "-e", "-c", typed] if kind == "bash" else [sys.executable, "-W", "ignore", "-c", typed]
                )
                done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300, check=False)
                assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
                if kind == "py":
                    assert done.stdout.split() == ["image_generation.partial_image"] * 2 + [
                        "image_generation.completed"
                    ]
                    assert (checkout / "cat-on-beach.png").stat().st_size > 500
                else:
                    assert '"polling_url"' in done.stdout
                    assert '"num_tokens":128' in done.stdout
        finally:
            server.terminate()
    assert server.returncode == 0


def test_pictures_and_links_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_path_of_a_machine() -> None:
    assert "/home/" not in README
    assert os.sep + "tmp" not in README
