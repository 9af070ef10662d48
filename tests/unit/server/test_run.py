"""What a serving process does before it serves."""

from __future__ import annotations

import gc
import socket
from pathlib import Path

import pytest

from limner.errors import OutputError
from limner.memory.free import spare_garbage_collector
from limner.options import ServeOptions
from limner.server.jobs.store import JobStore
from limner.server.run import serve


class Held:
    """Something that is alive at the start."""


def test_the_collector_leaves_alone_what_is_there_at_the_start() -> None:
    held = Held()
    try:
        spare_garbage_collector()
        assert gc.get_freeze_count() > 10_000
        assert not any(one is held for one in gc.get_objects())
        later = Held()
        assert any(one is later for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_a_folder_in_use_is_named_with_the_port_that_is(tmp_path: Path) -> None:
    """Both, so that one more try is enough; and a port alone holds no folder."""

    def start(port: int) -> str:
        with pytest.raises(OutputError) as caught:
            serve(pytest.fail, ServeOptions(data=str(tmp_path / "data"), port=port), model_name="x")
        return str(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert start(port).startswith(f"port: 127.0.0.1:{port} cannot be used")
        held = JobStore(tmp_path / "data")
        told = "is used by another server; stop it, or give another folder with --data"
        try:
            assert start(port).endswith(f"{told}, and another --port: {port} is in use too")
            assert start(0).endswith(told)
        finally:
            held.close()
