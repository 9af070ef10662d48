"""The order of a start: what can be refused is refused before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NoReturn

import pytest

from limner.errors import OutputError
from limner.options import ServeOptions
from limner.server.run import serve


def loaded() -> NoReturn:
    raise AssertionError("the model was loaded")


def test_a_port_in_use_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = ServeOptions(host="127.0.0.1", port=port, data=str(tmp_path / "data"))
        with pytest.raises(
            OutputError, match=rf"port: 127.0.0.1:{port} cannot be used .*; give another --port"
        ) as found:
            serve(loaded, options, model_name="tiny")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "data").exists()
