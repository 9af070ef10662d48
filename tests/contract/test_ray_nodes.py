"""The service on a Ray of several nodes, all of this machine, with its jobs in PostgreSQL: nodes and clusters that go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.test_ray_serve import Deployed, until
from tests.support.postgres import PROGRAMS, WHY, Server
from tests.support.serving import png, text

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not PROGRAMS, reason=WHY)]
ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'limner[ray]'")
pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'limner[ray]'")


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[Any]:
    """Nodes of one core each; killed, as far as they are there, when the block ends."""
    from ray.cluster_utils import Cluster

    from limner.deploy.cluster import quiet

    with quiet():
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20},
        )
        try:
            for _ in range(num_nodes - 1):
                made.add_node(num_cpus=1, object_store_memory=100 << 20)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def answers(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        http.get("/readyz")
        return True
    return False


def test_jobs_outlive_a_node_and_then_the_whole_cluster(server: Server, tiny_folder: Path) -> None:
    url = server.url()
    with cluster(2) as first:
        deployed = Deployed(tiny_folder, url, address=first.address)
        assert len(deployed.stats()) == 2  # asked once: the first time takes seconds
        ids = [  # those without references go to whoever is less busy: both nodes have work
            deployed.submit(seed=number, width=384, height=384, num_inference_steps=50, **image)
            for number in range(6)
            for image in ({}, {"input_image": text(png(seed=number))})
        ]
        until(lambda: len({pid for pid, engine, _ in deployed.stats() if engine.running}) == 2)
        (other,) = (node for node in first.worker_nodes)
        first.remove_node(other, allow_graceful=False)
        assert [deployed.poll(id_)["status"] for id_ in ids] == ["Ready"] * 12
        done = deployed.poll(ids[0])
        left = [deployed.submit(seed=number, num_inference_steps=50, width=256, height=256) for number in range(4)]
        for node in (*first.worker_nodes, first.head_node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        until(lambda: not answers(deployed.http))
        deployed.http.close()
    with cluster(1) as second:
        after = Deployed(tiny_folder, url, address=second.address, replicas=1)
        assert [after.poll(id_)["status"] for id_ in left] == ["Ready"] * 4
        path = httpx.URL(done["result"]["sample"]).raw_path.decode()
        assert after.http.get(path).status_code == 200  # drawn and signed by the one before
        after.http.close()
