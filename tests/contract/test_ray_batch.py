"""Bulk editing on many processes: a Ray of this machine with two workers, and clusters that are not as they should be."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from tests.support.tiny import picture

from limner.batch import Batch, BatchOptions, BatchSummary
from limner.cli import main
from limner.deploy.cluster import this_node
from limner.deploy.ray_batch import Cluster
from limner.engine.load import load_pipeline
from limner.errors import InvalidRequest, RemoteError
from limner.options import ModelOptions

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'limner[ray]'")

ROWS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "make it blue", "references": ["a.png"], "size": "64x64"},
    {"id": "two", "prompt": "put b into a", "references": ["a.png", "b.png"], "size": "64x64"},
    {"id": "three", "prompt": "a dog", "size": "64x64"},
    {"id": "four", "prompt": "make it red", "references": ["a.png"], "size": "80x64"},
    {"id": "five", "prompt": "x", "references": ["none.png"]},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    picture(96, 70).save(tmp_path / "a.png")
    picture(64, 80, seed=1).save(tmp_path / "b.png")
    write(tmp_path, ROWS)
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("local", workers=2) as found:
        yield found


@pytest.fixture
def model(tiny_folder: Path) -> ModelOptions:
    return ModelOptions(model=str(tiny_folder))


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, model: ModelOptions, cluster: Cluster | None, out: str = "out") -> BatchSummary:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / out)) as batch:
        pipe = load_pipeline(model, store=batch.store)
        groups = batch.plan(pipe)
        if cluster is None:
            batch.draw(pipe, groups)
        else:
            cluster.check(batch.options)
            cluster.draw(batch, groups, model)
        return batch.finish()


def run_here(folder: Path, model: ModelOptions, cluster: Cluster, out: str) -> BatchSummary:
    """In this process, with the threads of a worker."""
    before, (_, threads) = torch.get_num_threads(), cluster.share(model)
    torch.set_num_threads(threads)
    try:
        return run(folder, model, None, out)
    finally:
        torch.set_num_threads(before)


def results(folder: Path, out: str = "out") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / out / "results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_rows_that_repaint(folder: Path, model: ModelOptions, cluster: Cluster) -> None:
    mask = Image.new("L", (96, 70))
    mask.paste(255, (16, 16, 64, 48))
    mask.save(folder / "mask.png")
    rows = [
        {"id": "one", "prompt": "a hat", "references": ["a.png", "b.png"], "mask": "mask.png", "mask_blur": 2},
        {"id": "two", "prompt": "a hat", "references": ["a.png", "b.png"], "expand": [16, 0, 0, 10]},
        {"id": "three", "prompt": "a hat", "references": ["a.png", "b.png"], "mask": "b.png"},
    ]
    write(folder, rows)
    there, here = run(folder, model, cluster), run_here(folder, model, cluster, "here")
    assert (there.drawn, there.failed) == (here.drawn, here.failed) == (2, 1)
    assert results(folder) == results(folder, "here")
    for name in ("one.png", "two.png"):
        assert (folder / "out" / name).read_bytes() == (folder / "here" / name).read_bytes()


def test_no_cluster_on_this_machine(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> None:  # what Ray does; others on this machine may well run a cluster
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    words = ["batch", folder / "rows.jsonl", "-o", folder / "out", "--model", tiny_folder, "--ray", "auto"]
    assert main([str(word) for word in words]) == 2
    assert capsys.readouterr().err == (
        "limner: --ray auto: no cluster is there that answers; start one with `ray start --head`, or give HOST:PORT of its head\n"
    )


def test_the_same_files_and_results_as_one_process(folder: Path, model: ModelOptions, cluster: Cluster) -> None:
    expected = run_here(folder, model, cluster, "alone")
    summary = run(folder, model, cluster)
    assert (summary.drawn, summary.failed, summary.prefills) == (4, 1, 2)
    assert (expected.drawn, expected.failed, expected.prefills) == (4, 1, 2)
    assert results(folder) == results(folder, "alone")
    for row in ROWS[:4]:
        file = f"{row['id']}.png"
        assert (folder / "out" / file).read_bytes() == (folder / "alone" / file).read_bytes()
    assert not (folder / "out" / ".limner-batch").exists()
    picture(64, 64).save(folder / "none.png")  # and it goes on
    summary = run(folder, model, cluster)
    assert (summary.drawn, summary.done_before, summary.failed, summary.prefills) == (1, 4, 0, 1)


def test_a_worker_that_dies_is_replaced_and_no_row_is_lost(folder: Path, model: ModelOptions, cluster: Cluster) -> None:
    """And what it had drawn of its group is not drawn again."""
    rows = [{**ROWS[0], "id": f"row-{i}", "seed": i} for i in range(60)]
    write(folder, rows)
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        groups = batch.plan(load_pipeline(model, store=batch.store))
        killer = threading.Thread(target=_kill_worker, args=(folder / "out",), daemon=True)
        killer.start()
        cluster.draw(batch, groups, model)
        killer.join(0)
        assert not killer.is_alive()
        journals = [path.read_text().count('"status": "ok"') for path in batch.options.hidden.glob("journal-*.jsonl")]
        summary = batch.finish()
    assert (summary.drawn, summary.failed) == (60, 0)
    assert (len(journals), sum(journals)) == (2, 60)
    assert [row["id"] for row in results(folder)] == [row["id"] for row in rows]


def _kill_worker(out: Path) -> None:
    """Kills who has a journal with three rows open."""
    while True:
        for journal in out.glob(".limner-batch/journal-*.jsonl"):
            if journal.read_text().count('"status": "ok"') < 3:
                continue
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(file.path == str(journal) for file in process.open_files()):
                        process.kill()
                        return
        time.sleep(0.01)


def test_weights_that_differ_on_a_worker_end_the_run(folder: Path, model: ModelOptions, cluster: Cluster) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        groups = batch.plan(load_pipeline(model, store=batch.store))
        batch.model = "0" * 64
        with pytest.raises(RemoteError, match="cannot go on: --model: weights .* are not the driver's 0000"):
            cluster.draw(batch, groups, model)


def test_nodes_that_differ_are_refused_before_work(folder: Path, model: ModelOptions, cluster: Cluster) -> None:
    with Batch(BatchOptions(manifest=folder / "rows.jsonl", folder=folder / "out")) as batch:
        for found in cluster.nodes(str(folder / "rows.jsonl")).values():
            assert found == {**this_node(), "folder": "seen"}
        assert {found["folder"] for found in cluster.nodes(str(folder / "no")).values()} == {"missing"}
        other = {**this_node(), "torch": "1.13.1"}
        with pytest.raises(InvalidRequest, match="node 10.0.0.2 has torch 1.13.1, this process"):
            cluster.check(batch.options, ask=lambda token: {"10.0.0.2": other})
        assert not list(batch.options.hidden.glob("seen-*"))


def test_more_workers_than_there_are_cores(folder: Path, model: ModelOptions, cluster: Cluster) -> None:
    for workers, device, kind in ((10_000, "cpu", "CPU"), (1, "cuda", "GPU")):
        other = Cluster.__new__(Cluster)
        other.address, other.workers = "auto", workers
        if kind == "GPU" and ray.cluster_resources().get("GPU"):
            continue
        with pytest.raises(InvalidRequest, match=f"--workers: {workers} workers need a {kind} each"):
            other.share(ModelOptions(device=device))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:1",
            "limner: --ray 127.0.0.1:1: no cluster at 127.0.0.1:1 ([Errno 111] Connection refused); start one",
        ),
        ("somewhere", "limner: --ray: 'somewhere' is not local, auto or HOST:PORT of the head node"),
    ],
)
def test_a_cluster_that_is_not_there(
    address: str, message: str, folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["batch", folder / "rows.jsonl", "-o", folder / "out", "--model", tiny_folder, "--ray", address]
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(message)
    assert told.err.count("\n") == 1
