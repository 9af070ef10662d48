"""The command line as a user types it: exit code and message, files and JSON."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tests.support.command import run, run_script
from tests.support.tiny import picture

import limner
from limner.cli import main
from limner.images import read_metadata


@pytest.fixture
def files(tmp_path: Path) -> Path:
    picture(96, 70).save(tmp_path / "a.png")
    picture(64, 80, seed=1).save(tmp_path / "b.jpg")
    return tmp_path


def test_edit_writes_a_picture_that_says_how_it_was_made(files: Path, tiny_folder: Path) -> None:
    arguments = [
        "edit",
        "put b into a",
        "-i",
        files / "a.png",
        "-i",
        files / "b.jpg",
        "--seed",
        5,
        "--model",
        tiny_folder,
    ]
    done = run(*arguments, "-o", files / "out.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.png: 96x70, cut 0 left, 3 top, 0 right, 3 bottom, used as 96x64" in done.stdout
    assert f"{files / 'out.png'}: seed 5, 96x64" in done.stdout
    found = read_metadata(files / "out.png")
    assert found["prompt"] == "put b into a"
    assert (found["seed"], found["version"], len(found["model"])) == (5, limner.__version__, 64)
    assert len(found["references"]) == 2
    assert (found["width"], found["height"]) == (96, 64)
    assert run(*arguments, "-o", files / "again.png").returncode == 0
    assert (files / "again.png").read_bytes() == (files / "out.png").read_bytes()


def test_json_tells_seeds_timings_and_sizes(files: Path, tiny_folder: Path) -> None:
    done = run(
        "edit",
        "make it blue",
        "-i",
        files / "a.png",
        "-o",
        files / "out.webp",
        "--num-images",
        2,
        "--json",
        "--size",
        "64x96",
        "--steps",
        2,
        "--model",
        tiny_folder,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    seeds = [output["seed"] for output in found["outputs"]]
    assert [Path(output["file"]).name for output in found["outputs"]] == ["out-1.webp", "out-2.webp"]
    assert len(set(seeds)) == 2
    assert set(found["timings"]) == {"text", "references", "steps", "decode", "total"}
    assert len(found["timings"]["steps"]) == 2
    assert found["references"][0]["processed_size"] == [96, 64]
    assert (found["width"], found["height"], found["reference_cache"]) == (64, 96, "miss")
    for output in found["outputs"]:  # the drawn seed makes the same picture again
        again = files / f"again-{output['seed']}.webp"
        run(
            "edit",
            "make it blue",
            "-i",
            files / "a.png",
            "-o",
            again,
            "--size",
            "64x96",
            "--steps",
            2,
            "--model",
            tiny_folder,
            "--seed",
            output["seed"],
        )
        with Image.open(output["file"]) as first, Image.open(again) as second:
            assert first.size == second.size == (64, 96)
            difference = np.abs(np.asarray(first).astype(int) - np.asarray(second))
        assert difference.mean() < 0.5  # the batch sums in another order; another seed differs by tens
        assert read_metadata(again)["seed"] == output["seed"]


def test_generate(files: Path, tiny_folder: Path) -> None:
    done = run(
        "generate", "a dog", "-o", files / "out.jpg", "--size", "64x64", "--model", tiny_folder, "--dtype", "bfloat16"
    )
    assert done.returncode == 0, done.stderr
    with Image.open(files / "out.jpg") as image:
        assert (image.size, image.format) == ((64, 64), "JPEG")
    assert read_metadata(files / "out.jpg")["dtype"] == "bfloat16"


def test_without_a_name_pictures_get_numbers_that_are_free(files: Path, tiny_folder: Path) -> None:
    (files / "limner-2.png").write_bytes(b"mine")
    words = ("generate", "a dog", "--size", "64x64", "--steps", 1, "--num-images", 2, "--model", tiny_folder)
    for numbers in ((3, 4), (5, 6)):
        done = run(*words, "--json", cwd=files)
        assert done.returncode == 0, done.stderr
        outputs = json.loads(done.stdout)["outputs"]
        assert [output["file"] for output in outputs] == [f"limner-{number}.png" for number in numbers]
        assert [read_metadata(files / output["file"])["seed"] for output in outputs] == [o["seed"] for o in outputs]
    assert (files / "limner-2.png").read_bytes() == b"mine"


def test_says_what_was_replaced(files: Path, tiny_folder: Path) -> None:
    words = ("generate", "a dog", "--size", "64x64", "--steps", 1, "--model", tiny_folder, "-o", "out.png")
    assert "replaced" not in run(*words, "--seed", 1, cwd=files).stdout
    assert "out.png: replaced an earlier picture of Limner (seed 1, prompt 'a dog')" in run(*words, cwd=files).stdout
    picture(64, 64).save(files / "out.png")
    assert "out.png: replaced another file, as --force says" in run(*words, "--force", "--seed", 3, cwd=files).stdout
    found = json.loads(run(*words, "--json", cwd=files).stdout)
    assert found["outputs"][0]["replaced"] == {"seed": 3, "prompt": "a dog"}


def test_says_what_was_cut_from_the_prompt(files: Path, tiny_folder: Path) -> None:
    done = run("generate", "a dog " * 60 + "zebra", "-o", files / "out.png", "--size", "64x64", "--model", tiny_folder)
    assert done.returncode == 0
    assert "tokens, 48 are read; cut:" in done.stdout
    assert "zebra" in done.stdout


def test_refs_inspect(files: Path, tiny_folder: Path) -> None:
    done = run("refs", "inspect", files / "a.png", files / "b.jpg", "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert "a.png: 96x70, cut" in done.stdout
    assert "num_tokens: 44" in done.stdout
    found = json.loads(run("refs", "inspect", files / "a.png", "--json", "--model", tiny_folder).stdout)
    assert (found["num_tokens"], found["nbytes_bfloat16"]) == (24, 24 * 5 * 2 * 32 * 2)
    refs = limner.Pipeline.from_pretrained(tiny_folder).prefill(files / "a.png")
    refs.save(files / "pack.safetensors")
    found = json.loads(run("refs", "inspect", files / "pack.safetensors", "--json").stdout)
    assert (found["key"], found["num_tokens"], found["nbytes"]) == (refs.key, 24, refs.nbytes)


BAD = {
    "no prompt": (["edit", "", "-i", "a.png", "-o", "out.png"], "prompt: '' is empty; say what to draw"),
    "image to generate": (["generate", "x", "-o", "out.png", "-i", "a.png"], "with them: limner edit PROMPT -i FILE"),
    "no image": (["edit", "x", "-o", "out.png"], "--image: give either pictures (-i FILE, again for more) or one pack"),
    "another's file": (
        ["generate", "x", "-o", "a.png"],
        "output: a.png is there already, and Limner did not make it; add --force",
    ),
    "prompt is a picture": (["edit", "-i", "a.png", "b.jpg", "-o", "out.png"], "its own -i: -i b.jpg"),
    "picture as pack": (
        ["edit", "x", "--references", "a.png", "-o", "out.png"],
        "a.png is a PNG picture, not a pack; give",
    ),
    "manifest without a name": (["batch", "", "-o", "out"], "manifest: '' is no file name; give a file of JSON lines"),
    "store as pack": (["edit", "x", "--references", ".", "-o", "out.png"], "--store . -i FILE"),
    "file as store": (
        ["edit", "x", "-i", "a.png", "--store", "a.png", "-o", "out.png"],
        "--store: a.png is a file; give",
    ),
    "model's name": (["generate", "x", "--model", "klein4b", "-o", "out.png"], "did you mean klein-4b?"),
    "no model": (
        ["generate", "x", "--model", "", "-o", "out.png"],
        "model: '' is empty; give a path or hub id, or leave",
    ),
    "missing image": (["edit", "x", "-i", "no.png", "-o", "out.png"], "image 1: no.png cannot be read (No such file"),
    "not an image": (["edit", "x", "-i", "a.png", "-i", "text.png", "-o", "out.png"], "image 2: text.png is not a PNG"),
    "transparent": (["edit", "x", "-i", "clear.png", "-o", "out.png"], "it is transparent in places; flatten it"),
    "small": (["edit", "x", "-i", "small.png", "-o", "out.png"], "image 1 small.png: 40x40 is too small"),
    "size": (["generate", "x", "-o", "out.png", "--size", "100x64"], "size: width 100 is not a multiple of 16"),
    "size text": (["generate", "x", "-o", "out.png", "--size", "big"], "'big' is not WIDTHxHEIGHT"),
    "steps": (["generate", "x", "-o", "out.png", "--steps", "0"], "--steps: 0 is not a number of steps"),
    "seed": (["generate", "x", "-o", "out.png", "--seed", "-1"], "'-1' is not a whole number"),
    "number": (["generate", "x", "-o", "out.png", "--num-images", "0"], "--num-images: 0 is not within 1 to 1000"),
    "ending": (["generate", "x", "-o", "out.bmp"], "output: out.bmp has to end in .png, .jpg, .jpeg, .webp"),
    "folder": (["generate", "x", "-o", "nowhere/out.png"], "nowhere has to be a folder that you may write to"),
    "model": (["generate", "x", "-o", "out.png", "--model", "no-such-folder"], "neither a folder nor a hub id"),
    "device": (["generate", "x", "-o", "out.png", "--device", "abacus"], "'abacus' is not a device"),
    "command": (["paint"], "'paint' is not a command"),
    "nothing": ([], "the following arguments are required: COMMAND"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "text.png").write_text("hello")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(files / "clear.png")
    picture(40, 40).save(files / "small.png")
    before = sorted(os.listdir(files))
    arguments, message = BAD[name]
    if arguments[:1] in (["edit"], ["generate"]) and "--model" not in arguments:
        arguments = [*arguments, "--model", str(tiny_folder)]
    monkeypatch.chdir(files)
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    told = capsys.readouterr()
    assert code == 2
    assert told.err.count("\n") == 1
    assert told.err.startswith("limner: ")
    assert message in told.err
    assert told.out == ""
    assert sorted(os.listdir(files)) == before


def test_bad_input_in_a_process_of_its_own(files: Path) -> None:
    command = [sys.executable, "-m", "limner", "edit", "x", "-i", files / "no.png", "-o", files / "out.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"limner: image 1: {files / 'no.png'} cannot be read (No such file or directory); give a picture file\n"
    )


def test_help_imports_nothing_heavy() -> None:
    """A tenth of a second, where torch would take seconds; so what counts is what is imported."""
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "limner", "--help"], capture_output=True, text=True, check=True
    ).stderr
    for heavy in ("torch", "numpy", "PIL", "diffusers", "transformers"):
        assert f"| {heavy}\n" not in listed.replace("|   ", "| ").replace("  ", "")
    for command in (["edit"], ["generate"], ["quantize"], ["bench"], ["refs"], ["refs", "inspect"], ["refs", "warm"]):
        assert run(*command, "--help").returncode == 0


def test_progress_bar_on_a_terminal(files: Path, tiny_folder: Path) -> None:
    """Over load, text, references, steps and decode; and none where stderr is not a terminal."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    arguments = ["edit", "x", "-i", "a.png", "-o", "out.png", "--model", str(tiny_folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "limner", *arguments], stderr=child, stdout=subprocess.PIPE, cwd=files
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0
    process.stdout.close()  # type: ignore[union-attr]
    for part in (b"load", b"text", b"references", b"step", b"decode"):
        assert part in shown


def test_packs_and_stores(files: Path, tiny_folder: Path) -> None:
    """pack, inspect, edit from a pack; warm, ls, edit from the store, verify, rm."""
    pictures, model = (files / "a.png", files / "b.jpg"), ("--model", tiny_folder)
    done = run("refs", "pack", *pictures, "-o", files / "cast.safetensors", *model, "--json")
    assert done.returncode == 0, done.stderr
    packed = json.loads(done.stdout)
    assert (packed["num_references"], packed["num_tokens"]) == (2, 24 + 20)
    shown = json.loads(run("refs", "inspect", files / "cast.safetensors", "--json").stdout)
    assert (shown["key"], shown["nbytes"]) == (packed["key"], packed["nbytes"])
    edit = ("edit", "put b into a", "--seed", 5, *model)
    given = run(*edit, "--references", files / "cast.safetensors", "-o", files / "given.png", "--json")
    assert given.returncode == 0, given.stderr
    assert json.loads(given.stdout)["reference_cache"] == "given"

    store = ("--store", files / "store")
    warmed = json.loads(run("refs", "warm", *pictures, *store, *model, "--pin", "--json").stdout)
    assert warmed["key"] == packed["key"]
    (listed,) = json.loads(run("refs", "ls", *store, "--json").stdout)["entries"]
    assert (listed["key"], listed["pinned"], listed["num_references"]) == (packed["key"], True, 2)
    images = ("-i", pictures[0], "-i", pictures[1])
    kept = run(*edit, *images, *store, "-o", files / "kept.png", "--json")
    assert json.loads(kept.stdout)["reference_cache"] == "disk"
    told = run(*edit, *images, *store, "-o", files / "told.png").stdout.splitlines()
    assert told[-1].startswith(f"{files / 'told.png'}: seed 5, ")
    assert told[-1].endswith(" s, references from disk")
    fresh = run(*edit, *images, "-o", files / "fresh.png", "--json")
    assert json.loads(fresh.stdout)["reference_cache"] == "miss"
    with Image.open(files / "fresh.png") as expected:
        for name in ("given.png", "kept.png"):
            with Image.open(files / name) as found:
                assert np.array_equal(np.asarray(found), np.asarray(expected)), name

    assert run("refs", "verify", *store).stdout == f"{packed['key']}: whole\n"
    file = files / "store" / f"{packed['key']}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    damaged = run("refs", "verify", *store)
    assert damaged.returncode == 1
    assert "damaged or edited" in damaged.stdout
    mended = run(*edit, *images, *store, "-o", files / "mended.png", "--json")
    assert json.loads(mended.stdout)["reference_cache"] == "miss"
    assert "dropped" in mended.stderr
    run("refs", "warm", *pictures, *store, *model)  # an edit keeps on disk only what is read faster than computed
    removed = run("refs", "rm", packed["key"][:8], *store)
    assert removed.returncode == 0, removed.stderr
    assert json.loads(run("refs", "ls", *store, "--json").stdout) == {"entries": []}


def test_stores_are_neither_made_nor_emptied_by_looking(
    files: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped folder, files of others, damaged entries, and a budget that was asked for."""
    store = files / "store"
    for command in (["ls"], ["rm", "0" * 8], ["verify"]):
        assert main(["refs", *command, "--store", str(files / "typo")]) == 2
        assert "typo is not a folder; check the name" in capsys.readouterr().err
    assert not (files / "typo").exists()

    pipe, keys = limner.Pipeline.from_pretrained(tiny_folder), []
    for i in range(3):
        refs = pipe.prefill(picture(64, 64, seed=i))
        keys.append(refs.key)
        kept = limner.ReferenceStore(disk_path=store)
        kept.put(refs)
        kept.flush()
        os.utime(store / f"{refs.key}.safetensors", (i, i))
    (store / "model.safetensors").write_bytes(b"x" * 100_000)
    (store / f"{keys[2]}.safetensors").write_bytes(b"torn")
    os.utime(store / f"{keys[2]}.safetensors", (2, 2))
    assert main(["refs", "ls", "--store", str(store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == keys
    assert "damaged" in lines[2]
    assert main(["refs", "verify", "--store", str(store)]) == 1
    assert main(["refs", "rm", keys[2][:8], "--store", str(store)]) == 0
    assert not (store / f"{keys[2]}.safetensors").exists()

    capsys.readouterr()
    warm = ["refs", "warm", str(files / "a.png"), "--store", str(store), "--model", str(tiny_folder)]
    assert main([*warm, "--store-bytes", "100"]) == 2
    assert "did not take" in capsys.readouterr().err
    assert main(warm) == 0
    assert len(list(store.glob("*.safetensors"))) == 4  # without a budget all stay
    size = (store / f"{keys[0]}.safetensors").stat().st_size
    (store / f"{capsys.readouterr().out.split(':')[0]}.safetensors").unlink()
    assert main([*warm, "--store-bytes", str(3 * size)]) == 0
    assert not (store / f"{keys[0]}.safetensors").exists()
    assert (store / "model.safetensors").exists()


def test_a_store_under_a_url(files: Path, tiny_folder: Path) -> None:
    """warm, ls, edit with a folder before it and without, verify, rm: all over a URL."""
    url, cache, model = f"file://{files}/far/kv", files / "near", ("--model", tiny_folder)
    pictures = (files / "a.png", files / "b.jpg")
    warmed = run("refs", "warm", *pictures, "--store", url, *model, "--json")
    assert warmed.returncode == 0, warmed.stderr
    key = json.loads(warmed.stdout)["key"]
    (listed,) = json.loads(run("refs", "ls", "--store", url, "--json").stdout)["entries"]
    assert (listed["key"], listed["tier"], listed["num_references"]) == (key, "remote", 2)
    edit = ("edit", "put b into a", "--seed", 5, *model, "-i", pictures[0], "-i", pictures[1], "--json")
    found = []
    for number, store in enumerate(((), ("--store", url), *[("--store", url, "--store-cache", cache)] * 2)):
        done = run(*edit, *store, "-o", files / f"{number}.png")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["reference_cache"])
    assert found == ["miss", "remote", "remote", "disk"]
    with Image.open(files / "0.png") as expected:
        for number in (1, 2, 3):
            with Image.open(files / f"{number}.png") as image:
                assert np.array_equal(np.asarray(image), np.asarray(expected)), number
    assert run("refs", "verify", "--store", url).stdout == f"{key}: whole\n"
    file = files / "far" / "kv" / f"{key}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    damaged = run("refs", "verify", "--store", url)
    assert damaged.returncode == 1
    assert f"{url}/{key}.safetensors is damaged or edited" in damaged.stdout
    removed = run("refs", "rm", key[:8], "--store", url, "--store-cache", cache)
    assert removed.returncode == 0, removed.stderr
    assert [*cache.iterdir(), *file.parent.iterdir()] == []
    assert json.loads(run("refs", "ls", "--store", url, "--json").stdout) == {"entries": []}


def test_warm_says_why_nothing_was_uploaded(
    files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rights to read alone are no lack of space."""

    def deny(*_: object, **__: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(LocalFileSystem, "put_file", deny)
    warm = ["refs", "warm", str(files / "a.png"), "--store", f"file://{files}/far", "--model", str(tiny_folder)]
    assert main(warm) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("limner: --store")]
    assert "cannot be written (PermissionError: AccessDenied); check that the credentials" in told
    assert "free some space" not in told


def test_rm_of_what_is_in_the_folder_before_a_url_alone(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "far").mkdir()
    (files / "near").mkdir()
    (files / "near" / f"{'ab' * 32}.safetensors").write_bytes(b"x")
    remove = ["refs", "rm", "abababab", "--store", f"file://{files}/far", "--store-cache", str(files / "near")]
    assert main(remove) == 0
    assert list((files / "near").iterdir()) == []


def test_bad_input_of_refs(files: Path, tiny_folder: Path) -> None:
    picture(64, 64).save(files / "c.png")
    (files / "store").mkdir()
    cases = [
        (("refs", "ls"), "--store: no folder or URL is given"),
        (("refs", "ls", "--store", f"file://{files}/typo"), "remote: file://.*/typo is not there; check the name"),
        (
            ("refs", "ls", "--store", "nosuch://a:b@c/d"),
            r"remote: nosuch://\*\*\*@c/d: no filesystem is known for nosuch://",
        ),
        (
            ("refs", "rm", "01234567", "--store", f"file://{files}/store"),
            "KEY: '01234567' is the start of 0 keys in file://",
        ),
        (
            ("edit", "x", "-i", files / "c.png", "-o", files / "o.png", "--store-cache", files),
            "--store-cache: .* add --store URL",
        ),
        (
            ("refs", "warm", files / "c.png", "--store", f"file://{files}/store", "--store-bytes", "9"),
            "--store-bytes: 9 is the budget of a folder",
        ),
        (
            ("refs", "warm", files / "c.png", "--store", files / "store", "--store-cache", files),
            "--store-cache: .* is a folder before a URL",
        ),
        (("refs", "rm", "0123", "--store", files / "store"), "KEY: '0123' is the start of 0 keys"),
        (("refs", "pack", files / "c.png", "-o", files / "c.png"), "--output: c.png does not end in .safetensors"),
        (("refs", "pack", files / "no.png", "-o", files / "c.safetensors"), "image 1"),
        (("edit", "x", "-o", files / "o.png"), "--image: give either pictures"),
        (("edit", "x", "-i", files / "c.png", "--references", files / "c.png", "-o", files / "o.png"), "--image: give"),
        (
            ("edit", "x", "--references", files / "c.png", "-o", files / "o.png"),
            "--references: .* is a PNG picture, not a pack; give it as -i",
        ),
    ]
    for words, message in cases:
        done = run(*words)
        assert done.returncode == 2, words
        assert re.search(message, done.stderr), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_quantize_writes_a_model_that_loads(files: Path, tiny_folder: Path) -> None:
    done = run("quantize", tiny_folder, "-o", files / "int8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(files / "int8")
    for number, model in enumerate((("--model", files / "int8"), ("--model", tiny_folder, "--quantize", "int8"))):
        edit = ("edit", "make it blue", "-i", files / "a.png", "-o", files / f"{number}.png", "--seed", 1)
        assert run(*edit, *model).returncode == 0
    with Image.open(files / "0.png") as one, Image.open(files / "1.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))
    again = run("quantize", tiny_folder, "-o", files / "int8")
    assert (again.returncode, "is there already" in again.stderr) == (2, True)


def test_bench_measures_the_same_edit(files: Path) -> None:
    """diffusers and Limner, cold, warm and int8: one JSON line and a table; what they compute agrees."""
    done = run(
        "bench",
        "--geometry",
        1,
        1,
        2,
        "--references",
        0,
        2,
        "--side",
        64,
        "--reference-side",
        64,
        "--text",
        24,
        "--rounds",
        1,
        "--dtype",
        "float32",
        "-o",
        files / "bench.json",
        "--engines",
        "standard",
        "diffusers_kv",
        "cold",
        "warm",
        "int8_warm",
        "warm_int8_kv",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((files / "bench.json").read_text())
    _, two = report["cases"]
    assert two["relative_difference"]["cold"] < 1e-4
    assert two["relative_difference"]["warm"] == two["relative_difference"]["cold"]
    assert 0 < two["relative_difference"]["warm_int8_kv"] < 0.02
    assert 0 < two["relative_difference"]["int8_warm"] < 0.1
    assert two["kept_bytes"] == 2 * 16 * 3 * 2 * 128 * 4
    assert "| Limner, references kept |" in (files / "bench.md").read_text()
    refused = run("bench", "--device", "cuda:99")
    assert refused.returncode == 2
    assert "device: cuda:99 is not on this machine" in refused.stderr
    refused = run("bench", "--side", 100)
    assert (refused.returncode, "--side: 100 is not a multiple of 16" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "option", [("--background", "red"), ("--max-pixels", 300), ("--store", "kept"), ("--kv-cache-dtype", "int8")]
)
def test_options_of_pictures_are_refused_beside_a_pack(option: tuple[str, object], files: Path) -> None:
    done = run("edit", "a dog", "--references", files / "none.safetensors", *option, "-o", files / "out.png")
    assert done.returncode == 2
    assert done.stderr.startswith(f"limner: {option[0]}: a pack is used as it is")


def test_seeds_are_plain_digits(files: Path) -> None:
    done = run("generate", "a dog", "--seed", "\N{SUPERSCRIPT TWO}", "-o", files / "out.png")
    assert (done.returncode, "is not a whole number from 0" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("script", "words", "field"),
    [
        ("int8_error", ["--side", 64, "--text", 16], "errors"),
        ("store", ["--side", 64, "--rounds", 1], "disk_hit_seconds"),
        ("memory", ["--references", 1, "--batch", 2, "--side", 64, "--text", 16, "--rounds", 1], "share_of_diffusers"),
        (
            "scaling",
            ["--references", 1, "--sides", 64, "--batches", 1, "--side", 64, "--text", 16, "--rounds", 1],
            "images",
        ),
    ],
)
def test_benchmarks_run(script: str, words: list[object], field: str, tmp_path: Path) -> None:
    """In miniature: they end, write what they print, and hold their numbers."""
    file = Path(__file__).parents[2] / "benchmarks" / f"{script}.py"
    done = run_script(file, "--geometry", 2, 1, 1, *words, "-o", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["benchmark"] == script
    assert report[field]
    if script == "int8_error":
        assert 0 < report["errors"]["int8 weights and activations"] < 0.025
        assert 0 < report["errors"]["int8 K/V"] < report["errors"]["fp8 K/V"]
