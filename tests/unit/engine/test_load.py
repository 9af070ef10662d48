"""Loading in a thread that does not stay."""

from __future__ import annotations

import threading

import pytest

from limner import InvalidRequest, Pipeline
from limner.engine import load_in_thread


def test_the_loading_thread_ends(pipe: Pipeline) -> None:
    loaders: list[threading.Thread] = []

    def load() -> Pipeline:
        loaders.append(threading.current_thread())
        return pipe

    assert load_in_thread(load) is pipe
    assert loaders[0] is not threading.current_thread()
    assert not loaders[0].is_alive()

    def broken() -> Pipeline:
        raise InvalidRequest("model", "is not there")

    with pytest.raises(InvalidRequest, match="is not there"):
        load_in_thread(broken)
