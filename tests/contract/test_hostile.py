"""Hostile requests: each is refused, and the service goes on. The corpus is that of the benchmark, which has the clock."""

from __future__ import annotations

import importlib.util
import random
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.network import Network, default_context
from tests.support.serving import Served, opened, text

from limner import InvalidRequest, Pipeline
from limner.images import prepare_reference
from limner.outbound.client import OutboundClient
from limner.outbound.policy import OutboundPolicy
from limner.server.access.limits import LimitPolicy
from limner.server.http.connection import HastyProtocol


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "attacks" / "corpus.py"
    spec = importlib.util.spec_from_file_location("hostile", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # a decoder warns of what it reads; a server logs that
def test_each_is_refused_and_the_service_goes_on(pipe: Pipeline, tmp_path: Path, corpus: ModuleType) -> None:
    network = Network()
    client = OutboundClient(
        OutboundPolicy(), resolver=network.resolve, connector=network, ssl_context=default_context()
    )
    limits = LimitPolicy(requests_per_minute=1e9, burst=10**6)
    with Served(
        pipe, tmp_path / "data", body_seconds=corpus.BODY_SECONDS, fetch_urls=True, outbound=client, limits=limits
    ) as served:
        found = {case.name: case.send(served.url) for case in corpus.cases()}
        wrong = {name: status for name, status in found.items() if not 400 <= status < 500}
        assert wrong == {}
        assert len(found) > 200
        assert network.connected == []  # nothing that was refused was asked for
        assert served.files("inputs") == served.files("results") == []
        assert served.service.jobs.counts() == {}
        for name, data in corpus.harmless().items():
            assert served.draw(input_image=text(data))["status"] == "Ready", name
        stored = {file.read_bytes() for file in (served.data / "inputs").iterdir()}
        assert not any(b"alert(1)" in data or b"php" in data for data in stored)
        assert served.service.runner.num_live == 0
        assert served.http.get("/readyz").status_code == 200


@pytest.mark.filterwarnings("ignore")
def test_no_picture_makes_the_decoder_fail_otherwise(pipe: Pipeline, corpus: ModuleType) -> None:
    """Files that are damaged anywhere: read, or refused in words, never anything else."""
    rng = random.Random(0)
    read = 0
    exif = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}
    for format_ in ("PNG", "JPEG", "WEBP"):
        whole = corpus.picture(format=format_, **exif)
        assert prepare_reference(whole, policy=pipe.reference_policy).report.oriented
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 2, 8))):
                at = rng.randrange(min(len(data), rng.choice((64, 256, len(data)))))
                data[at] = rng.randrange(256)
            if rng.random() < 0.2:
                del data[rng.randrange(len(data)) :]
            try:
                prepare_reference(bytes(data), policy=pipe.reference_policy)
                read += 1
            except InvalidRequest:
                pass
    assert read > 20
    assert opened(corpus.picture()).size == (96, 80)


def test_a_head_that_does_not_come_is_not_waited_for(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HastyProtocol, "head_seconds", 0.3)
    with Served(pipe, tmp_path / "data") as served:
        for sent in (
            b"",
            b"GET /healthz HTTP/1.1\r\nHost: ",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /h",
        ):
            with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
                connection.sendall(sent)
                answer = b""
                while more := connection.recv(65536):  # until the server closes
                    answer += more
            assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")
        end = time.monotonic() + 1.0  # one that is answered for longer than a head may take
        while time.monotonic() < end:
            assert served.http.get("/healthz").status_code == 200
            time.sleep(0.1)
