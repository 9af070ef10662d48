"""`DeployOptions`: the keys of a YAML are the options of the command, checked, and nothing else."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
yaml = pytest.importorskip("yaml")

from limner.deploy.options import DeployOptions  # noqa: E402
from limner.errors import InvalidRequest  # noqa: E402
from limner.options import ModelOptions, ServeOptions, ServiceOptions, options_of  # noqa: E402

FILE = Path(__file__).parents[3] / "docs" / "deploy.yaml"


def test_every_option_is_a_key_with_the_same_default() -> None:
    for option in options_of(DeployOptions):
        assert DeployOptions.parse({option.name: option.default}) == DeployOptions()
    assert DeployOptions.parse({}) == DeployOptions()


def test_values_may_be_text() -> None:
    """As `serve run limner.deploy.ray:app replicas=2` gives them."""
    found = DeployOptions.parse({"replicas": "2", "unsafe_no_checks": "true", "queue": "1.5", "loras": [["a", 1]]})
    assert (found.replicas, found.unsafe_no_checks, found.queue, found.loras) == (2, True, 1.5, (("a", 1.0),))
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "--replica: 2: Extra inputs are not permitted"),
        ({"port": 80}, "--port: 80: Extra inputs are not permitted"),
        ({"replicas": 0}, "--replicas: 0: Input should be greater than or equal to 1"),
        ({"queue": 0}, "--queue: 0: Input should be greater than 0"),
        ({"drain": -1}, "--drain: -1: Input should be greater than or equal to 0"),
        ({"max_waiting": "no"}, "--max-waiting: 'no': Input should be a valid integer"),
        ({"dtype": "float8"}, "--dtype: 'float8': Input should be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        DeployOptions.parse(values)


def test_the_example_is_accepted_with_every_comment_taken_in() -> None:
    text = re.sub(r"^(\s+)# (\w+: )", r"\1\2", FILE.read_text(), flags=re.MULTILINE)
    (application,) = yaml.safe_load(text)["applications"]
    assert {"max_replicas", "store_cache", "keys"} <= set(application["args"])
    DeployOptions.parse(application["args"])


def test_parts_are_those_of_a_replica_and_of_the_ingress() -> None:
    options = DeployOptions.parse({"device": "cuda", "max_batch": 3, "c2pa_development": True, "data": "/jobs"})
    assert options.model_options() == ModelOptions(device="cuda")
    serving = options.serve_options(host="::1", port=7)
    assert serving == ServeOptions(host="::1", port=7, max_batch=3, c2pa_development=True, data="/jobs")
    assert isinstance(serving, ServiceOptions)


def test_paths_do_not_depend_on_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIMNER_KEYS", raising=False)
    (tmp_path / "model").mkdir()
    found = DeployOptions.parse(
        {"model": "model", "vae": "some/hub-id", "store": "kv", "data": "jobs", "keys": "none"}
    ).checked()
    assert (found.model, found.vae) == (str(tmp_path / "model"), "some/hub-id")
    assert (found.store, found.data, found.keys) == (str(tmp_path / "kv"), str(tmp_path / "jobs"), "none")
    assert (found.store_folder, found.on_head, found.keyed) == (str(tmp_path / "kv"), True, False)
    found = DeployOptions.parse({"store": "s3://b/p", "store_cache": "near", "data": "postgresql://h/d"}).checked()
    assert (found.store, found.store_folder) == ("s3://b/p", os.path.abspath("near"))
    assert (found.data, found.on_head) == ("postgresql://h/d", False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas: 2 is less than the 3 of --replicas"),
        ({"store_memory": "lots"}, "--store-memory: 'lots' is not an amount of memory"),
        ({"store": "kv", "store_cache": "near"}, "store_cache: near is a folder before a URL"),
    ],
)
def test_what_does_not_go_together(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        DeployOptions.parse(values).checked()
