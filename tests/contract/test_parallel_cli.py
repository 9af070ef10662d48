"""`torchrun -m limner edit`: the picture of one process, one who writes and prints, and an end of all when one fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import ranks
from limner.cli import main
from limner.images import read_metadata
from limner.references import read_identity
from limner.weights.folder import bundled_model

SAMPLES = bundled_model().parent / "samples"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(size: int, *args: object) -> subprocess.CompletedProcess[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-port",
        str(free_port()),
        "--nproc-per-node",
        str(size),
    ]
    return subprocess.run(
        [*launcher, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Limner's lines on stderr; the launcher says what it has to say beside them."""
    return [line for line in done.stderr.splitlines() if line.startswith("limner: ")]


def test_two_processes_draw_the_picture_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "edit",
        "use the background of image 2",
        "-i",
        SAMPLES / "cat.png",
        "-i",
        SAMPLES / "beach.png",
        "--seed",
        1,
    ]
    arguments += ["--json", "--size", "64x64", "--store", tmp_path / "store"]
    done = torchrun(2, "-m", "limner", *arguments, "-o", tmp_path / "two.png")
    assert (done.returncode, said(done)) == (0, []), done.stderr
    assert main([str(x) for x in (*arguments, "-o", tmp_path / "one.png")]) == 0
    two, one = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert {**two, "timings": 0, "outputs": 0} == {**one, "timings": 0, "outputs": 0}
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # a value at the edge of two colours may round to either
    metadata: list[dict[str, Any]] = [read_metadata(tmp_path / f"{name}.png") for name in ("one", "two")]
    assert metadata[0] == metadata[1]
    shards = [read_identity(file).shard for file in (tmp_path / "store").glob("*.safetensors")]
    assert sorted(shard for shard in shards if shard) == [(0, 2), (1, 2)]


def test_two_processes_share_a_store_under_a_url(tmp_path: Path) -> None:
    arguments = ["edit", "make it red", "-i", SAMPLES / "cat.png", "--seed", 1, "--json", "--steps", 1]
    arguments += ["--store", f"file://{tmp_path}/far", "-o", tmp_path / "out.png"]
    found = []
    for _ in range(2):
        done = torchrun(2, "-m", "limner", *arguments)
        assert (done.returncode, said(done)) == (0, []), done.stderr
        found.append(json.loads(done.stdout)["reference_cache"])
    shards = [read_identity(file).shard for file in (tmp_path / "far").iterdir()]
    assert sorted(shard for shard in shards if shard) == [(0, 2), (1, 2)]
    assert found == ["miss", "remote"]


def test_what_all_refuse_is_said_once(tmp_path: Path) -> None:
    done = torchrun(3, "-m", "limner", "generate", "a cat", "-o", tmp_path / "out.png")
    assert done.returncode != 0
    assert said(done) == [
        "limner: --parallel: num_heads=4 cannot be divided by 3 processes; allowed for tensor: 1, 2, 4; start as many (torchrun "
        "--nproc-per-node), or use sequence"
    ]
    assert not (tmp_path / "out.png").exists()


def test_one_stdin_is_no_prompt_for_several() -> None:
    done = torchrun(2, "-m", "limner", "edit", "-", "-i", SAMPLES / "cat.png")
    assert done.returncode != 0
    assert said(done) == [
        "limner: PROMPT: - reads one stdin, and torchrun started several processes; give the prompt as a word"
    ]


def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    program = """
        import os, sys
        from limner.cli import main
        from limner.errors import CapacityError
        from limner.model.transformer import Transformer

        def fail(*args, **kwargs):
            raise CapacityError("no memory is left in process 1")

        if os.environ["RANK"] == "1":
            Transformer.forward = fail  # the other waits for its share of a sum
        sys.exit(main(sys.argv[1:]))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = torchrun(2, tmp_path / "program.py", "generate", "a cat", "-o", tmp_path / "out.png", "--size", "64x64")
    assert done.returncode != 0
    assert said(done) == ["limner: no memory is left in process 1"]
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "serve: runs in one process, and torchrun started 2; start it without torchrun"),
        (["batch", "rows.jsonl", "-o", "out"], "batch: runs in one process, and torchrun started 2"),
        (["refs", "ls"], "refs: runs in one process, and torchrun started 2"),
        (["edit"], "the following arguments are required"),
        (["--seed=4", "edit"], "--seed: belongs behind the command"),
    ],
)
def test_what_does_not_run_under_torchrun(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "_GRACE", 0.0)
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        try:
            code: object = main(arguments)
        except SystemExit as end:
            code = end.code
        assert code == 2
        err = capsys.readouterr().err
        if rank == "0":
            assert message in err
            assert err.count("limner: ") == 1
        else:
            assert err == ""


def test_parallel_needs_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "-o", "a.png", "--parallel", "sequence"]) == 2
    assert "--parallel: sequence needs several processes; start them with torchrun" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs a GPU for each process, and there are not two")
def test_two_gpus_draw_the_picture_of_one(tmp_path: Path) -> None:
    arguments = ["edit", "grey", "-i", SAMPLES / "cat.png", "--seed", 1, "--device", "cuda"]
    assert main([str(x) for x in (*arguments, "-o", tmp_path / "one.png")]) == 0
    for mode in ("tensor", "sequence"):
        done = torchrun(2, "-m", "limner", *arguments, "-o", tmp_path / "two.png", "--parallel", mode)
        assert (done.returncode, said(done)) == (0, []), done.stderr
        one, two = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
        assert np.abs(one - two).max() <= 2
