"""The service on a Ray of this machine: two replicas that draw, and clusters that are not as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from tests.support.lora_files import make_pairs, original
from tests.support.lora_files import write as write_lora
from tests.support.serving import opened, png, text
from tests.support.tiny import generators, picture

from limner import Pipeline, ReferenceStore
from limner.cli import main
from limner.errors import InvalidRequest
from limner.options import ModelOptions

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'limner[ray]'")
pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'limner[ray]'")
SIZE = {"width": 64, "height": 64}
SECONDS = 120.0
"""For what takes two on an idle machine."""


class Deployed:
    """The application with the tiny model: two replicas of one core, and what tests ask of it.

    `lora` is a file that acts where a request asks for it.
    """

    def __init__(
        self, model: Path, data: Path | str, *, address: str = "local", replicas: int = 2, lora: Path | None = None
    ) -> None:
        from ray import serve

        from limner.deploy.cluster import connect, quiet
        from limner.deploy.ray import NAME

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        connect(address, option="--address", num_cpus=2)
        self.options = {
            "model": str(model),
            "loras": [] if lora is None else [[str(lora), 0]],
            "data": str(data),
            "replicas": replicas,
            "threads": 1,
            "store_memory": "64MiB",
            "drain": 5,
            "unsafe_no_checks": True,
            "requests_per_minute": 1e6,
            "concurrent": 1000,
        }
        with quiet():
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            self.run()
        self.replicas = serve.get_deployment_handle("Replica", NAME)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def run(self, **changed: Any) -> None:
        from ray import serve

        from limner.deploy.cluster import quiet
        from limner.deploy.ray import NAME, app

        with quiet():
            serve.run(app({**self.options, **changed}), name=NAME, route_prefix="/")

    def stats(self) -> list[Any]:
        """Process, engine and store of each replica that runs."""
        return list(self.replicas.broadcast("stats").results(timeout_s=30))

    def submit(self, **body: Any) -> str:
        answer = self.http.post("/v1/edit", json={"prompt": "a red ball", "output_format": "png", **SIZE, **body})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def poll(self, id: str) -> dict[str, Any]:
        def ended() -> Any:
            with contextlib.suppress(httpx.TransportError):  # an ingress that starts again
                answer = self.http.get("/v1/get_result", params={"id": id})
                return answer.status_code == 200 and answer.json()["status"] != "Pending" and answer.json()
            return None

        return dict(until(ended))

    def pixels(self, found: dict[str, Any]) -> np.ndarray[Any, Any]:
        assert found["status"] == "Ready", found
        return np.asarray(opened(self.http.get(found["result"]["sample"]).content)).astype(int)


def until(done: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


@pytest.fixture(scope="module")
def deployed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    from limner.deploy.cluster import quiet

    try:
        lora = write_lora(tmp_path_factory.mktemp("loras"), original(make_pairs()), "ink.safetensors")
        made = Deployed(tiny_folder, tmp_path_factory.mktemp("deployed"), lora=lora)
        made.lora = lora  # type: ignore[attr-defined]
        yield made
        made.http.close()
    finally:
        with quiet():
            ray.shutdown()


def test_each_reference_set_is_prefilled_once_and_pictures_are_those_of_one_process(
    deployed: Deployed, tiny_folder: Path
) -> None:
    found = [  # one at a time: nobody waits, so no set is worth a second copy
        deployed.poll(
            deployed.submit(input_image=text(png(seed=number % 5)), input_image_2=text(png(seed=9)), seed=number)
        )
        for number in range(25)
    ]
    stats = deployed.stats()
    assert sum(engine.prefills for _, engine, _ in stats) == 5
    assert sum(store.num_entries["memory"] for _, _, store in stats) == 5
    assert min(engine.images for _, engine, _ in stats) > 0  # and not all at one
    pipe = Pipeline.from_pretrained(tiny_folder)
    image = [picture(64, 64, seed=2), picture(64, 64, seed=9)]
    expected = pipe("a red ball", image=image, width=64, height=64, generator=generators(7)).images[0]
    assert np.abs(deployed.pixels(found[7]) - np.asarray(expected).astype(int)).max() <= 2  # batches round otherwise


def test_a_mask_and_weights_come_through(deployed: Deployed, tiny_folder: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    drawn = io.BytesIO()
    mask.save(drawn, "PNG")
    control = {"mask_blur": 0, "reference_weights": [1, 0.5]}
    asked = {"input_image": text(png(seed=2)), "input_image_2": text(png(seed=9)), "mask": text(drawn.getvalue())}
    found = deployed.pixels(deployed.poll(deployed.submit(**asked, **control, seed=3)))
    image = [picture(64, 64, seed=2), picture(64, 64, seed=9)]
    pipe = Pipeline.from_pretrained(tiny_folder)
    expected = pipe("a red ball", image=image, mask_image=mask, generator=generators(3), **control, **SIZE).images[0]
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 2
    changed = (found != np.asarray(image[0]).astype(int)).any(-1)
    assert changed[16:48, 16:48].mean() > 0.9
    changed[16:48, 16:48] = False
    assert not changed.any()


def test_loras_of_a_request_come_through(deployed: Deployed, tiny_folder: Path) -> None:
    """They are checked in the ingress, act in a replica, and their K/V are found again there."""
    assert deployed.http.get("/v1/capabilities").json()["loras"] == [{"name": "ink", "strength": 0.0}]
    answer = deployed.http.post("/v1/edit", json={"prompt": "a", **SIZE, "loras": {"grain": 1}})
    assert answer.status_code == 422
    assert "'grain' not loaded; loaded: ink" in answer.json()["detail"][0]["msg"]
    pipe = Pipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(deployed.lora, "ink")  # type: ignore[attr-defined]
    sources = []
    for loras in (None, {"ink": 0.5}, {"ink": 0.5}, {"ink": -0.5}, None):
        found = deployed.poll(deployed.submit(input_image=text(png(seed=77)), seed=3, loras=loras))
        sources.append(found["result"]["limner"]["reference_cache"])
        expected = pipe(
            "a red ball", image=picture(64, 64, seed=77), generator=generators(3), loras=loras or {}, **SIZE
        )
        assert np.abs(deployed.pixels(found) - np.asarray(expected.images[0]).astype(int)).max() <= 2, loras
        told = {one["name"]: one["strength"] for one in found["result"]["limner"].get("loras", [])}
        assert told == (loras or {})
    assert sources == ["miss", "miss", "memory", "miss", "memory"]


def test_a_killed_replica_loses_no_accepted_job(deployed: Deployed) -> None:
    jobs = [
        deployed.submit(input_image=text(png(seed=number % 4)), seed=number, num_inference_steps=50)
        for number in range(16)
    ]
    victim, _, _ = until(lambda: next((s for s in deployed.stats() if s[1].running and s[1].waiting), None))
    os.kill(victim, signal.SIGKILL)
    found = [deployed.poll(id) for id in jobs]
    assert [one["status"] for one in found] == ["Ready"] * 16
    drawn = np.stack([deployed.pixels(one) for one in found])
    again = deployed.poll(deployed.submit(input_image=text(png(seed=3)), seed=15, num_inference_steps=50))
    assert np.abs(drawn[15] - deployed.pixels(again)).max() <= 2

    def others() -> list[int] | None:
        with contextlib.suppress(ray.exceptions.ActorDiedError):  # the victim may still be asked
            pids = [pid for pid, _, _ in deployed.stats()]
            return pids if len(pids) == 2 and victim not in pids else None
        return None

    assert until(others)  # one came for it


def test_a_cancelled_job_stops_in_its_replica(deployed: Deployed) -> None:
    def cancelled() -> int:
        return sum(engine.cancelled for _, engine, _ in deployed.stats())

    before = cancelled()
    id_ = deployed.submit(num_inference_steps=50, width=512, height=512)
    until(
        lambda: (
            deployed.http.get(f"/v1/jobs/{id_}").json()["status"] == "pending"
            and any(s[1].running for s in deployed.stats())
        )
    )
    assert deployed.http.delete(f"/v1/jobs/{id_}").status_code == 200
    assert deployed.http.get(f"/v1/jobs/{id_}").json()["status"] == "cancelled"
    until(lambda: cancelled() == before + 1 and not any(engine.running for _, engine, _ in deployed.stats()))


def test_progress_comes_through(deployed: Deployed) -> None:
    id_ = deployed.submit(num_inference_steps=40, width=256, height=256)
    with deployed.http.stream("GET", f"/v1/jobs/{id_}/events") as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data:")]
    told = [json.loads(line.removeprefix("data:")) for line in lines]
    steps = [one["progress"] for one in told]
    assert steps == sorted(steps)
    assert len({step for step in steps if 0 < step < 1}) > 2
    assert deployed.poll(id_)["status"] == "Ready"


def test_forgotten_references_are_forgotten_in_all_replicas(deployed: Deployed) -> None:
    def kept() -> int:
        return sum(store.num_entries["memory"] for _, _, store in deployed.stats())

    before = kept()
    made = deployed.http.post("/v1/references", json={"images": [text(png(80, 64, seed=77))]})
    assert made.status_code == 201, made.text
    key = made.json()["id"]
    assert made.json()["cache"] == "miss"
    assert kept() == before + 1
    found = deployed.poll(deployed.submit(references=key))
    assert found["status"] == "Ready"
    assert deployed.http.delete(f"/v1/references/{key}").status_code == 200
    assert kept() == before
    metrics = deployed.http.get("/metrics").text
    assert f'limner_references_bytes{{tier="memory"}} {sum(s[2].nbytes["memory"] for s in deployed.stats())}' in metrics


def test_an_ingress_that_died_takes_up_its_jobs(deployed: Deployed) -> None:
    jobs = [
        deployed.submit(input_image=text(png(seed=number % 4)), seed=number, num_inference_steps=50)
        for number in range(6)
    ]
    (ingress,) = [process for process in psutil.process_iter() if _is_ingress(process)]
    ingress.kill()
    assert [deployed.poll(id)["status"] for id in jobs] == ["Ready"] * 6


def test_an_update_replaces_everything_and_loses_no_job(deployed: Deployed) -> None:
    before = {pid for pid, _, _ in deployed.stats()}
    jobs = [deployed.submit(input_image=text(png(seed=number % 4)), num_inference_steps=50) for number in range(12)]
    deployed.run(max_batch=4, max_pixels=64 * 64)
    assert [deployed.poll(id)["status"] for id in jobs] == ["Ready"] * 12
    assert deployed.http.get("/v1/capabilities").json()["max_images"] == 4
    made = deployed.http.post("/v1/references", json={"images": [text(png(256, 256, seed=5))]}).json()
    assert made["references"][0]["processed_size"] == [64, 64]  # the ingress waited for replicas of the new model
    assert not before & {pid for pid, _, _ in deployed.stats()}


def _is_ingress(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name().startswith("ray::ServeRepli") and "Ingress" in " ".join(process.cmdline())
    return False


def test_replicas_share_a_store_under_a_url(deployed: Deployed, tiny_folder: Path, tmp_path: Path) -> None:
    """A replica finds what it never made, with the bits of whoever made it; what is forgotten is forgotten there too."""
    store = ReferenceStore(remote=f"file://{tmp_path}/far")
    store.put(Pipeline.from_pretrained(tiny_folder).prefill(picture(64, 64, seed=77)))
    store.flush()
    deployed.run(store=f"file://{tmp_path}/far", store_cache=str(tmp_path / "near"))
    found = deployed.poll(deployed.submit(input_image=text(png(seed=77)), seed=1))
    assert found["status"] == "Ready", found
    assert found["result"]["limner"]["reference_cache"] == "remote"
    assert sum(store.hits["remote"] for _, _, store in deployed.stats()) == 1
    (key,) = store.keys()
    assert [file.stem for file in (tmp_path / "near").iterdir()] == [key]
    assert any(deployed.replicas.broadcast("forget", key).results(timeout_s=30))
    assert store.keys() == []
    assert list((tmp_path / "near").iterdir()) == []


def test_a_serve_that_runs_is_left_alone(deployed: Deployed) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "limner", "deploy", "--address", address, "--threads", "1", "--unsafe-no-checks"]
    environment = {name: value for name, value in os.environ.items() if name != "LIMNER_KEYS"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 2, ended.stderr
    assert f"limner: --address: {address}: Ray Serve runs there already" in ended.stderr
    assert deployed.http.get("/readyz").json() == {"status": "ready"}


# what is refused or lost, without a cluster


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (ray.exceptions.OutOfMemoryError("the node ran out of memory"), True),
        (ray.exceptions.ActorDiedError(), True),
        (ray.exceptions.NodeDiedError("gone"), True),
        (ray.exceptions.RayActorError(), False),
        (ray.exceptions.ObjectLostError("00" * 28, None, ""), False),
        (asyncio.CancelledError(), False),
        (ray.exceptions.RayTaskError("draw", "a traceback", ValueError("ours")), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_errors_are_a_lost_replica(error: BaseException, counts: bool | None) -> None:
    """And which of those may be the request's own doing; a fault of ours stays one."""
    from limner.deploy.ingress import RayReplicas
    from limner.deploy.remote import LostReplica

    class Handle:
        cancelled = 0

        def options(self, **_: Any) -> Handle:
            return self

        def remote(self, *_: Any, **__: Any) -> Handle:
            return self

        def cancel(self) -> None:
            self.cancelled += 1

        async def __aiter__(self) -> AsyncIterator[Any]:
            raise error
            yield

    async def heard() -> None:
        async with RayReplicas(handle).run(None) as events:  # type: ignore[arg-type]
            async for _ in events:
                pass

    handle: Any = Handle()
    with pytest.raises(type(error) if counts is None else LostReplica) as raised:
        asyncio.run(heard())
    if counts is not None:
        assert raised.value.counts is counts
    assert handle.cancelled == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--address", "127.0.0.1:1"],
            "--address 127.0.0.1:1: no cluster at 127.0.0.1:1 ([Errno 111] Connection refused);",
        ),
        (["--address", "somewhere"], "--address: 'somewhere' is not local, auto or HOST:PORT of the head node"),
        (["--store", "nosuch://a:b@bucket/kv"], "remote: nosuch://***@bucket/kv: no filesystem is known for nosuch://"),
        (["--store", "file:///dev/null/kv"], "remote: file:///dev/null/kv cannot be opened (NotADirectoryError"),
        (["--store-cache", "/tmp/kv"], "--store-cache: /tmp/kv is a folder before a URL"),
        (
            ["--store", "file:///tmp/kv", "--store-bytes", "9"],
            "--store-bytes: 9 is the budget of a folder; give one before the URL",
        ),
        (["--data", "mysql://u@db/jobs"], "--data: mysql:// is not read; give a folder, or postgresql://HOST/DATABASE"),
        (
            ["--data", "postgresql://u:%zz@db/jobs"],
            "--data: the postgresql:// URL cannot be read; give postgresql://USER@HOST",
        ),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas: 2 is less than the 3 of --replicas"),
        (["--replicas", "0"], "--replicas: 0: Input should be greater than or equal to 1"),
        (["--host", "0.0.0.0"], "--host: '0.0.0.0' can be reached from other machines, and there are no keys"),
        (["--store-memory", "lots"], "--store-memory: 'lots' is not an amount of memory"),
        (["--port", "70000"], "--port: 70000 is not within 1 to 65535"),
        (["--tls-key", "key.pem"], "--tls-certificate: needs --tls-key"),
    ],
)
def test_refused_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIMNER_KEYS", raising=False)
    assert main(["deploy", *words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"limner: {message}")
    assert told.err.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["deploy", "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"limner: --port: 127.0.0.1:{port} cannot be used")


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "limner.deploy.ray", raising=False)
    assert main(["deploy"]) == 2
    assert capsys.readouterr().err == (
        "limner: limner deploy needs ray, which is not installed; pip install 'limner[ray,serve]'\n"
    )


def test_keys_of_the_command_are_asked_of_the_head_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from limner.deploy.ray import DeployOptions

    monkeypatch.delenv("LIMNER_KEYS", raising=False)
    assert not DeployOptions().checked().keyed
    monkeypatch.setenv("LIMNER_KEYS", "anna:anna-key-0123456789")
    assert DeployOptions().checked().keyed


def test_nodes_that_differ(tiny_folder: Path) -> None:
    from limner.deploy.cluster import check_nodes, this_node
    from limner.deploy.replica import Replica

    with pytest.raises(InvalidRequest, match="has torch [^ ]*, this process 1.13.1; pictures would differ"):
        Replica(
            ModelOptions(model=str(tiny_folder)),
            versions={**this_node(), "torch": "1.13.1"},
            threads=1,
            max_batch=1,
            store=None,
            store_bytes=None,
            store_memory=0,
            memory_bytes=None,
        )
    for found, message in (
        ({"error": "ModuleNotFoundError: No module named 'limner'"}, "node n cannot draw"),
        ({**this_node(), "lacks": "/m"}, "node n has no /m"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            check_nodes({"n": found}, driver=this_node(), option="--address")


def test_a_yaml_names_options_and_no_others() -> None:
    from limner.deploy.ray import app

    yaml = pytest.importorskip("yaml")
    file = Path(__file__).parents[2] / "docs" / "deploy.yaml"
    (application,) = yaml.safe_load(file.read_text())["applications"]
    assert application["import_path"] == "limner.deploy.ray:app"
    app(application["args"])
    app({"replicas": "2", "unsafe_no_checks": "true"})  # as `serve run limner.deploy.ray:app replicas=2` says it
    with pytest.raises(InvalidRequest, match="--replica: 2: Extra inputs are not permitted"):
        app({**application["args"], "replica": 2})


def test_replicas_follow_the_queue_where_they_may() -> None:
    from ray.serve.config import AutoscalingConfig

    from limner.deploy.ray import DeployOptions, _scaling

    assert _scaling(DeployOptions.parse({"replicas": 3})) == {"num_replicas": 3}
    told = _scaling(DeployOptions.parse({"replicas": 2, "max_replicas": 5, "queue": 3}))
    config = AutoscalingConfig(**told["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 3)


def test_no_more_replicas_than_fit(deployed: Deployed) -> None:
    from limner.deploy.ray import DeployOptions, _check_cluster

    options = DeployOptions.parse({"replicas": 10_000})
    with pytest.raises(InvalidRequest, match="--replicas: 10000 replicas of 1 CPU do not fit, only"):
        _check_cluster(options, address="local", threads=1)
    with pytest.raises(InvalidRequest, match="--address: node .* has no /no/model; put it there"):
        _check_cluster(DeployOptions.parse({"model": "/no/model"}), address="local", threads=1)


def test_the_command_serves_until_it_is_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "deploy",
        "--model",
        tiny_folder,
        "--data",
        tmp_path / "data",
        "--port",
        port,
        "--replicas",
        1,
        "--threads",
        1,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "LIMNER_KEYS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "limner", *map(str, words)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if f"limner: model at http://127.0.0.1:{port}, 1 replicas" in line:
            break
    assert process.poll() is None, "".join(lines)
    assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30).json() == {"status": "ready"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
