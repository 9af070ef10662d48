"""`limner batch` as a user types it: files, messages, exit codes, kills."""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny import picture

from limner.cli import main
from limner.cli.output import BatchProgress

ROWS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "make it blue", "references": ["a.png"], "seed": 5},
    {"id": "two", "prompt": "put b into a", "references": ["a.png", "sub/b.png"], "seed": 6, "size": "64x80"},
    {"id": "three", "prompt": "a dog", "size": "64x64", "seed": 7, "steps": 2},
    {"id": "four", "prompt": "make it red", "references": ["a.png"], "seed": 8, "size": "80x64"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LIMNER_STORE", raising=False)
    (tmp_path / "sub").mkdir()
    picture(96, 70).save(tmp_path / "a.png")
    picture(64, 80, seed=1).save(tmp_path / "sub" / "b.png")
    write(tmp_path, ROWS)
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]], more: str = "") -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)


def batch(folder: Path, model: Path, *words: object) -> int:
    return main(["batch", *map(str, (folder / "rows.jsonl", "-o", folder / "out", "--model", model, *words))])


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def test_files_are_those_of_limner_edit(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, metadata and all, wherever they stand in the manifest."""
    assert batch(folder, tiny_folder) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.startswith(f"{folder / 'out' / 'results.jsonl'}: 4 rows: 4 drawn, 0 failed; 2 prefills, ")
    for row in ROWS:
        words = ["edit" if "references" in row else "generate", row["prompt"], "--seed", row["seed"]]
        words += [word for name in row.get("references", []) for word in ("-i", folder / name)]
        words += [word for name in ("size", "steps") if name in row for word in (f"--{name}", row[name])]
        assert main([*map(str, words), "-o", str(folder / "alone.png"), "--model", str(tiny_folder)]) == 0
        assert (folder / "out" / f"{row['id']}.png").read_bytes() == (folder / "alone.png").read_bytes(), row["id"]


def test_broken_rows_are_named_and_the_others_drawn(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = [{"id": f"m{i}", "prompt": "x", "references": [f"none{i}.png"]} for i in range(10)]
    write(folder, [*ROWS, *missing], '{"id": "one", "prompt": "again"}\nhello\n')
    assert batch(folder, tiny_folder, "--json", "--format", "webp") == 1
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert (summary["rows"], summary["drawn"], summary["failed"], summary["prefills"]) == (16, 4, 12, 2)
    lines = told.err.splitlines()
    assert lines[0] == (
        f"limner: line 5 (m0): references: {folder / 'none0.png'} cannot be read (No such file or directory); "
        "give a picture file"
    )
    assert lines[-1] == f"limner: 2 more failed; see {folder / 'out' / 'results.jsonl'}"
    assert len(lines) == 11
    assert [row["line"] for row in results(folder)] == list(range(1, 17))
    assert [row["status"] for row in results(folder)] == ["ok"] * 4 + ["error"] * 12
    assert sorted(path.name for path in (folder / "out").glob("*.webp")) == [
        "four.webp",
        "one.webp",
        "three.webp",
        "two.webp",
    ]


BAD = {
    "no manifest": (["batch", "none.jsonl", "-o", "out"], "manifest: none.jsonl cannot be read (No such file"),
    "empty": (["batch", "empty.jsonl", "-o", "out"], "manifest: empty.jsonl has no rows"),
    "no output": (["batch", "rows.jsonl"], "the following arguments are required: -o/--output"),
    "output": (["batch", "rows.jsonl", "-o", "a.png"], "a.png cannot be written (Not a directory)"),
    "format": (
        ["batch", "rows.jsonl", "-o", "out", "--format", "gif"],
        "'gif' is not allowed; there are png, jpeg, webp",
    ),
    "at once": (
        ["batch", "rows.jsonl", "-o", "out", "--images-at-once", "0"],
        "--images-at-once: 0 is not a whole number",
    ),
    "store": (["batch", "rows.jsonl", "-o", "out", "--store", "a.png"], "disk_path: "),
    "store url": (
        ["batch", "rows.jsonl", "-o", "out", "--store", "nosuch://b/p"],
        "no filesystem is known for nosuch://",
    ),
    "cache": (["batch", "rows.jsonl", "-o", "out", "--store-cache", "near"], "--store-cache: "),
    "model": (["batch", "rows.jsonl", "-o", "out", "--model", "no-such-folder"], "neither a folder nor a hub id"),
    "device": (["batch", "rows.jsonl", "-o", "out", "--device", "abacus"], "'abacus' is not a device"),
    "pixels": (["batch", "rows.jsonl", "-o", "out", "--max-pixels", "1"], "--max-pixels: 1 is not allowed"),
    "workers": (["batch", "rows.jsonl", "-o", "out", "--workers", "2"], "--workers: 2 processes are Ray's; add --ray"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.jsonl").write_text("")
    monkeypatch.chdir(folder)
    words, message = BAD[name]
    try:
        code = main(words if "--model" in words else [*words, "--model", str(tiny_folder)])
    except SystemExit as stop:  # argparse
        code = stop.code  # type: ignore[assignment]
    told = capsys.readouterr()
    assert code == 2
    assert told.err.count("\n") == 1
    assert told.err.startswith("limner: ")
    assert message in told.err
    assert told.out == ""
    assert not list(folder.glob("out/*.png"))


def test_ray_that_is_not_installed(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without_ray(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    assert batch(folder, tiny_folder, "--ray") == 2
    assert capsys.readouterr().err == ("limner: --ray needs ray, which is not installed; pip install 'limner[ray]'\n")


def test_killed_and_run_again(folder: Path, tiny_folder: Path) -> None:
    """SIGKILL while rows are drawn: every row is there once, and none that was recorded is drawn again."""
    write(folder, [{**ROWS[i % 2], "id": f"row-{i}", "seed": i} for i in range(60)])
    command = [
        sys.executable,
        "-m",
        "limner",
        "batch",
        "rows.jsonl",
        "-o",
        "out",
        "--model",
        str(tiny_folder),
        "--json",
    ]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    file = folder / "out" / "results.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.read_bytes().count(b"\n")
    assert 5 <= done < 60
    recorded = [json.loads(line) for line in file.read_bytes().split(b"\n")[:done]]
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    progress = [
        line for line in again.stderr.splitlines() if " of 60 rows, " in line
    ]  # on a machine that is slow today
    assert (again.returncode, again.stderr.splitlines()) == (0, progress)
    summary = json.loads(again.stdout)
    assert (summary["rows"], summary["done_before"], summary["drawn"]) == (60, done, 60 - done)
    assert summary["prefills_in_all"] in (2, 3)  # one more where the kill came before its K/V were on disk
    found = results(folder)
    assert [row["id"] for row in found] == [f"row-{i}" for i in range(60)]
    assert [row for row in found if row["id"] in {r["id"] for r in recorded}] == sorted(
        recorded, key=lambda r: r["line"]
    )
    assert len(list((folder / "out").glob("*.png"))) == 60
    assert not [
        path for path in (folder / "out").iterdir() if path.name.startswith(".limner-") and path.suffix != ".lock"
    ]


def test_what_stops_a_run_says_how_to_go_on(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from limner.batch import folder as module

    real, written = module.write_file, []

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise module.OutputError("output: no space left on device")
        real(path, data)

    monkeypatch.setattr(module, "write_file", full)
    assert batch(folder, tiny_folder) == 2
    assert capsys.readouterr().err == (
        "limner: --output: no space left on device; 2 of 4 rows are done and kept: mend that and run the same command again\n"
    )
    monkeypatch.undo()
    assert batch(folder, tiny_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == 2


def test_progress_lines_where_there_is_no_terminal(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BatchProgress, "SECONDS", 0.0)
    assert batch(folder, tiny_folder) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"limner: {i} of 4 rows" for i in range(5)]
    assert lines[-1].endswith(" a second")


def test_a_bar_on_a_terminal(folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    parts: list[bytes] = []

    def read() -> None:  # while it is written: a terminal that nobody reads fills up, and the writer waits
        with contextlib.suppress(OSError):  # Linux says so when the last writer has closed
            while part := os.read(parent, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        code = batch(folder, tiny_folder)
        monkeypatch.undo()
    reader.join(timeout=60)
    os.close(parent)
    assert code == 0
    shown = b"".join(parts).decode()
    assert "4/4" in shown
    assert "failed=0" in shown


def test_a_store_under_a_url_is_used_and_kept(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prefills, cache in ((2, "near"), (0, "other")):
        store = ("--store", f"file://{folder}/far", "--store-cache", folder / cache)
        assert batch(folder, tiny_folder, *store, "--json") == 0
        assert json.loads(capsys.readouterr().out)["prefills"] == prefills
        assert len(list((folder / "far").iterdir())) == len(list((folder / cache).glob("*.safetensors"))) == 2
        caches = [row["reference_cache"] for row in results(folder)]
        shutil.rmtree(folder / "out")
    assert caches == ["remote", "remote", "none", "memory"]


def test_a_store_that_is_given_is_used_and_kept(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(folder, tiny_folder, "--store", folder / "kept", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prefills"] == 2
    shutil.rmtree(folder / "out")
    assert batch(folder, tiny_folder, "--store", folder / "kept", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prefills"] == 0
    assert [row["reference_cache"] for row in results(folder)] == ["disk", "disk", "none", "memory"]
