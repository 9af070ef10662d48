"""`limner samples`, `doctor` and `completion`, and how `edit` names its files."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.support.native import without_tiles

import limner.doctor
from limner.cli.draw import _free_name, _output_files, _read_prompt
from limner.cli.main import main
from limner.errors import InvalidRequest, OutputError
from limner.images import save
from limner.model.int8 import has_int8_products
from limner.native import tiles


def test_samples_are_copied_and_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "pictures"
    assert main(["samples", str(folder), "--json"]) == 0
    names = {Path(file).name for file in json.loads(capsys.readouterr().out)["files"]}
    assert {"cat.png", "beach.png", "rows.jsonl"} <= names == {file.name for file in folder.iterdir()}
    assert main(["samples", str(folder)]) == 0  # they are the same
    capsys.readouterr()
    (folder / "cat.png").write_bytes(b"mine")
    assert main(["samples", str(folder)]) == 2
    assert "is another file; add --force" in capsys.readouterr().err
    assert (folder / "cat.png").read_bytes() == b"mine"
    assert main(["samples", str(folder), "--force"]) == 0
    assert len((folder / "cat.png").read_bytes()) > 500
    assert main(["samples", str(folder / "cat.png")]) == 2
    assert "is a file; give another folder" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["groups"]["versions"]["torch"].startswith("2.")
    assert found["groups"]["kernels"]["attention bfloat16"] in (
        "tiles",
        "flash",
        "native",
        "chunked",
        "chunked_float32",
    )
    assert "GiB free of" in found["groups"]["memory and disk"]["memory"]


def test_doctor_says_how_int8_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> str:
        return limner.doctor.examine().groups["kernels"]["int8 products"]

    if has_int8_products():
        assert (told() == "AMX tiles") == (tiles.why_missing() is None)
        without_tiles(monkeypatch)
        assert told() == "oneDNN, with a second copy of the weights; no AMX tiles: the CPU has no AMX"
        monkeypatch.setattr("limner.model.int8.has_int8_products", lambda: False)
    assert told() == "widened: int8 saves memory, not time"


def test_doctor_names_what_keeps_limner_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limner.doctor, "_required", lambda: [("no-such-thing", "1"), ("numpy", "99")])
    report = limner.doctor.examine()
    file = limner.doctor._tested_file()
    missing, old = report.problems
    assert missing == f'no-such-thing is not installed; pip install -c "{file}" no-such-thing'
    assert re.fullmatch(rf'numpy [\d.]+ is older than 99; pip install -c "{file}" numpy', old)
    assert report.lines()[-1].startswith("problem: numpy")


@pytest.mark.parametrize(("version", "index"), [("2.9.0", ""), ("2.9.0+cpu", "cpu"), ("2.9.0+cu130", "cu130")])
def test_doctor_says_how_to_get_the_tested_versions(version: str, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names the file by its whole path, so it can be typed anywhere, and takes torch from where it came."""
    here = {"torch": version, "numpy": "2.8.1"}
    monkeypatch.setattr(limner.doctor, "_required", lambda: [("numpy", "2"), ("torch", "2")])
    monkeypatch.setattr(limner.doctor, "_tested", lambda: {"torch": "3.0", "numpy": "2.4.6"})
    monkeypatch.setattr("importlib.metadata.version", here.__getitem__)
    (note, *_) = limner.doctor.examine().notes
    file = limner.doctor._tested_file()
    assert file is not None and file.is_absolute() and "torch==" in file.read_text()  # noqa: PT018
    assert note == (
        f"other versions than those that are tested: numpy 2.8.1 (tested: 2.4.6), torch {version} (tested: 3.0); these are "
        f'tested together: pip install -c "{file}" numpy torch'
        + (f" --extra-index-url https://download.pytorch.org/whl/{index}" if index else "")
    )


@pytest.mark.parametrize("version", ["2.9.0a0+145a3a7bda.nv25.10", "2.9.0+gitba56102"])
def test_doctor_leaves_a_torch_that_no_index_has(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one of Nvidia's images, or one that was built here: pip would put another in its place, or find none."""
    here = {"torch": version, "numpy": "2.8.1"}
    monkeypatch.setattr(limner.doctor, "_required", lambda: [("numpy", "2"), ("torch", "2")])
    monkeypatch.setattr(limner.doctor, "_tested", lambda: {"torch": "3.0", "numpy": "2.4.6"})
    monkeypatch.setattr("importlib.metadata.version", here.__getitem__)
    (note, *_) = limner.doctor.examine().notes
    assert f"torch {version} (tested: 3.0)" in note
    assert note.endswith(f'; these are tested together: pip install -c "{limner.doctor._tested_file()}" numpy')
    here["numpy"] = "2.4.6"
    (note, *_) = limner.doctor.examine().notes
    assert note == f"other versions than those that are tested: torch {version} (tested: 3.0)"
    monkeypatch.setattr(limner.doctor, "_required", lambda: [("torch", "99")])
    assert limner.doctor.examine().problems == (f"torch {version} is older than 99; get a newer build of it",)


def test_doctor_says_that_torch_cannot_be_imported(tmp_path: Path) -> None:
    """As where a library of CUDA is missing; in a process of its own, since torch is imported here."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "limner", "doctor"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1] == (
        "problem: torch cannot be imported (libcudart.so.13: cannot open shared object file); pip install --force-reinstall "
        "torch, a build for this machine"
    )


def test_doctor_looks_at_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(limner.doctor, "_MODEL_BYTES", 1 << 62)
    notes: list[str] = []
    assert limner.doctor._room(notes)["models of the hub"].startswith(f"{tmp_path / 'hub'}, ")
    assert notes[0].startswith(f"{tmp_path / 'hub'} has ")
    assert notes[0].endswith("HF_HOME or HF_HUB_CACHE names another folder")


def test_the_tested_versions_are_found() -> None:
    assert limner.doctor._tested()["torch"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "limner.bash"
    script.write_text(capsys.readouterr().out)
    program = f"source {script}; COMP_WORDS=(limner edit --refe); COMP_CWORD=2; _shtab_limner; printf '%s\\n' ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert {"--references", "--reference-weight", "--reference-guidance"} <= set(done.stdout.split())


def run_into(out: int, *words: str, folder: Path, unbuffered: str = "") -> tuple[int, str]:
    """Return exit code and stderr of a command that prints into a file descriptor."""
    done = subprocess.run(
        [sys.executable, "-m", "limner", *words],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "unbuffered"), [(["samples"], ""), (["samples"], "1"), (["completion", "bash"], ""), (["--help"], "")]
)
def test_a_reader_that_left_is_no_traceback(words: list[str], unbuffered: str, tmp_path: Path) -> None:
    """What is short stays in a buffer to the end, what is long is written before."""
    reader, writer = os.pipe()
    os.close(reader)
    assert run_into(writer, *words, folder=tmp_path, unbuffered=unbuffered) == (1, "")
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        told = run_into(full.fileno(), "samples", folder=tmp_path)
    assert told == (1, "limner: stdout cannot be written (No space left on device)\n")


def test_a_file_that_fails_is_not_taken_for_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write to a full disk names no file, in whichever file it is."""

    def fails() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("limner.doctor.examine", fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "limner: a file cannot be read or written (No space left on device)\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_that_fails_at_once_is_told(unbuffered: str, tmp_path: Path) -> None:
    """As of what is too long for a buffer, or where there is none."""
    with Path("/dev/full").open("w") as full:
        told = run_into(full.fileno(), "completion", "bash", folder=tmp_path, unbuffered=unbuffered)
    assert told == (1, "limner: stdout cannot be written (No space left on device)\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_command_that_fails_keeps_its_code_where_nothing_can_be_printed(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    (tmp_path / "no.txt").write_text("no picture")
    with Path("/dev/full").open("w") as full:
        code, told = run_into(full.fileno(), "verify", "no.txt", "good.png", folder=tmp_path)
    assert code == 2
    assert told.splitlines() == [
        "limner: file: no.txt is not a PNG, JPEG or WebP picture; give one",
        "limner: stdout cannot be written (No space left on device)",
    ]


def test_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _output_files(None, 2, force=False) is None
    for name in ("out.png", "many-2.png"):
        Path(name).write_bytes(b"")
    for output, number in (("out.png", 1), ("many.png", 3)):
        with pytest.raises(OutputError, match="is there already, and Limner did not make it; add --force"):
            _output_files(output, number, force=False)
        assert len(_output_files(output, number, force=True) or ()) == number
    for name, metadata in (("out.png", {"seed": 1}), ("photo.webp", {})):
        save(Image.new("RGB", (16, 16)), name, metadata=metadata)
    assert _output_files("out.png", 1, force=False) == [Path("out.png")]  # Limner's own is made again
    with pytest.raises(OutputError, match=r"photo\.webp is there already"):
        _output_files("photo.webp", 1, force=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        OutputError, match=r"limner-0\.png cannot be written: \. has to be a folder that you may write to"
    ):
        _output_files(None, 1, force=False)


def test_two_commands_side_by_side_take_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One looks for a name, and another command makes a file of that name before it does."""
    monkeypatch.chdir(tmp_path)
    with _free_name() as first, _free_name() as second:
        assert (first, second) == (Path("limner-1.png"), Path("limner-2.png"))
        save(Image.new("RGB", (16, 16), "red"), second)
        save(Image.new("RGB", (16, 16), "blue"), first)
    for name in ("limner-7.png", "limner-x.png"):
        Path(name).write_bytes(b"")
    listed = [*Path().iterdir()]
    Path("limner-8.png").write_bytes(b"theirs")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda _: iter(listed))
        with _free_name() as third:
            assert third == Path("limner-9.png")
    assert Path("limner-8.png").read_bytes() == b"theirs"
    with pytest.raises(OutputError), _free_name() as fourth:
        raise OutputError("the disk is full")
    assert not fourth.exists()


@pytest.mark.parametrize(("given", "prompt"), [(b"make it snow\n", "make it snow"), ("für\r\n".encode(), "für")])
def test_a_prompt_of_stdin(given: bytes, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert _read_prompt("-") == prompt
    assert _read_prompt("- a dash") == "- a dash"


def test_a_prompt_of_stdin_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(InvalidRequest, match="no UTF-8"):
        _read_prompt("-")
