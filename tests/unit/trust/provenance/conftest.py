"""A signer, and a server that nobody should visit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.provenance import Server

from limner.trust.provenance import Signer, development_credentials


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return development_credentials(tmp_path_factory.mktemp("c2pa") / "development")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()
    server.thread.join()
    server.server.server_close()
