"""The first hour of a new user: README and the guides are typed in a new environment outside of the checkout.

Minutes and megabytes of each step, as a table on stdout and as JSON with `-o`. Where a page says `pip install .` a wheel
of the checkout is installed, with the versions of constraints.txt and nothing but what the page names; packages come from
where pip takes them. The page is opened in Chromium, if there is one.

.venv/bin/python tests/first_hour/run.py -o benchmarks/results/first_hour.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GUIDES = ("install", "edit", "references", "control", "memory", "batch")
SET_UP = ("make ", "python3 -m venv", "pip install -c constraints.txt --no-deps torch")
TESTED = "-c constraints.txt"
NOT_SOURCE = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__")


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    """Return kind and text of the blocks of code of these kinds, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [(kind, text) for kind, text in found if kind in kinds]


def megabytes(folder: Path) -> float:
    """Return what the files of a folder take on disk."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) / 1e6


class Hour:
    """A new environment, a folder to work in, and what each step took."""

    def __init__(self, home: Path) -> None:
        self.home, self.environment, self.folder = home, home / "environment", home / "work"
        self.folder.mkdir()
        self.steps: list[dict[str, Any]] = []
        path = f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        self.variables = {k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": path, "HOME": str(home)}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, and weigh what it added to the environment and the folder."""
        before, start = megabytes(self.environment) + megabytes(self.folder), time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        added = megabytes(self.environment) + megabytes(self.folder) - before
        self.steps.append({"step": name, "seconds": round(seconds, 1), "megabytes": round(added, 1)})
        print(f"{name}: {seconds:.1f} s, {added:.1f} MB", file=sys.stderr, flush=True)

    def shell(self, text: str) -> None:
        """Type lines into a shell; the first that fails ends the hour with what it said."""
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{text}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")

    def type_page(self, page: Path) -> None:
        """Type what a page says, but for making the environment."""
        for kind, text in blocks(page, "sh", "python"):
            if kind == "python":
                (self.folder / "typed.py").write_text(text)
                self.shell("python typed.py")
                continue
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("pip install") and not line.startswith(SET_UP):
                    self.pip_install(line.removeprefix("pip install").strip())
                elif line.strip() and not line.startswith(SET_UP):
                    self.shell(line)

    def pip_install(self, what: str) -> None:
        """Install what a page says, with the tested versions; the checkout, `.`, is a wheel of it."""
        what = what.removeprefix(TESTED).strip()
        if what == ".":
            (what,) = map(str, self.home.glob("*.whl"))
        pip = f"{self.environment / 'bin' / 'python'} -m pip"
        self.shell(f"{pip} install -c {ROOT / 'constraints.txt'} --disable-pip-version-check --quiet {what}")


def install(hour: Hour) -> None:
    """Make the demo, the environment as README says, and a wheel, of a copy of the checkout without what was built there."""
    source = shutil.copytree(ROOT, hour.folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    with hour.step("make demo"):
        hour.shell(f"make -C {source} demo PYTHON={sys.executable}")
    if not (source / "build" / "demo.png").is_file():
        sys.exit("make demo made no picture")
    shutil.rmtree(source / ".venv")
    with hour.step("python -m venv, pip install torch"):
        hour.shell(f"{sys.executable} -m venv {hour.environment}")
        hour.pip_install("--no-deps torch")
    with hour.step("pip wheel . --no-deps"):
        python = hour.environment / "bin" / "python"
        hour.shell(
            f"{python} -m pip wheel {source} --no-deps --wheel-dir {hour.home} --disable-pip-version-check --quiet"
        )
    shutil.rmtree(source)
    with hour.step("pip install ."):
        hour.pip_install(".")


def serve(hour: Hour) -> None:
    """Install what the service needs, start it, type the guides' requests, and draw once on the page."""
    with hour.step("pip install 'limner[serve]'"):
        hour.pip_install("'limner[serve]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [hour.environment / "bin" / "limner", "serve", "--port", str(port), "--data", hour.folder / "data"]
    with hour.step("limner serve, until it answers"), (hour.folder / "log").open("w") as log:
        server = subprocess.Popen(words, stderr=log, env=hour.variables, cwd=hour.folder)
        until_ready(f"http://127.0.0.1:{port}/readyz", server, hour.folder / "log")
    try:
        for guide in ("serve", "control"):
            with hour.step(f"docs/{guide}.md, its requests"):
                for _, text in blocks(ROOT / "docs" / f"{guide}.md", "bash"):
                    hour.shell(text.replace("8731", str(port)).replace("curl -s", "curl -s --fail-with-body"))
        chromium = shutil.which("chromium")
        if chromium is not None:
            with hour.step("the page: a prompt typed, a picture seen"):
                draw_on_page(chromium, f"http://127.0.0.1:{port}/")
    finally:
        server.terminate()
        server.wait(60)


def until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            sys.exit(f"limner serve ended with {server.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"limner serve is not ready:\n{log.read_text()}")


def draw_on_page(chromium: str, url: str) -> None:
    """Type a prompt that nothing else asks for, press Enter in it with Control, and wait for its picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        prompt = page.get_by_label("Prompt", exact=True)
        prompt.fill("a small owl in a forest")
        prompt.press("Control+Enter")
        picture = page.get_by_alt_text(re.compile("^a small owl in a forest, seed "))
        picture.scroll_into_view_if_needed(timeout=60_000)
        page.wait_for_function("image => image.complete && image.naturalWidth", arg=picture.element_handle())
        browser.close()


def table(steps: list[dict[str, Any]]) -> str:
    lines = ["| step | minutes | MB |", "|---|---|---|"]
    lines += [f"| {s['step']} | {s['seconds'] / 60:.1f} | {s['megabytes']:.0f} |" for s in steps]
    total = sum(s["seconds"] for s in steps) / 60, sum(s["megabytes"] for s in steps)
    return "\n".join([*lines, f"| all | {total[0]:.1f} | {total[1]:.0f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", metavar="FILE", help="JSON of all steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        hour = Hour(Path(name))
        install(hour)
        with hour.step("README.md, top to bottom"):
            hour.type_page(ROOT / "README.md")
        for guide in GUIDES:
            with hour.step(f"docs/{guide}.md"):
                hour.type_page(ROOT / "docs" / f"{guide}.md")
        serve(hour)
    print(table(hour.steps))
    if args.output:
        found = {"steps": hour.steps, "python": platform.python_version(), "date": date.today().isoformat()}
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
