"""The OpenAPI document is up to date and whole, and what the service answers is in it.

`LIMNER_FUZZ` is the number of examples a route; without it there are few, and the same ones each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.support.serving import Served, png, text

from limner import Pipeline
from limner.server.access.limits import LimitPolicy

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"
EXAMPLES = int(os.environ.get("LIMNER_FUZZ", "0"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
schema = schemathesis.openapi.from_path(FILE)


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pipe = Pipeline.from_pretrained(tiny_folder)
    limits = LimitPolicy(requests_per_minute=1e9, burst=10**6, concurrent=10**6)
    folder = tmp_path_factory.mktemp("schema") / "data"
    with Served(pipe, folder, limits=limits, max_output_pixels=128 * 128, max_canvas_pixels=128 * 128) as served:
        yield served


@schema.parametrize()
@settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_in_the_document(case: Any, served: Served) -> None:
    case.call_and_validate(base_url=served.url, checks=CHECKS)


def test_the_document_is_up_to_date(served: Served) -> None:
    assert json.loads(FILE.read_text()) == served.http.get("/openapi.json").json(), "run docs/openapi.py"


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths = json.loads(FILE.read_text())["paths"]
    return [(path, method, found) for path, methods in paths.items() for method, found in methods.items()]


def test_it_is_whole() -> None:
    document = json.loads(FILE.read_text())

    def check(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                target = document
                for part in value["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)

    check(document)
    names = [found["operationId"] for _, _, found in operations()]
    assert len(set(names)) == len(names)
    for path, method, found in operations():
        assert found.get("summary"), (path, method)
        assert found["tags"], (path, method)
        if not path.startswith(("/health", "/readyz", "/v1/results")):
            assert {"key": []} in found["security"], path
            assert {"bearer": []} in found["security"], path
    assert {
        "/v1/flux-2-klein-9b-preview",
        "/v1/flux-2-klein-9b",
        "/v1/flux-2-klein-4b",
        "/v1/edit",
        "/v1/get_result",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/models",
        "/v1/references",
        "/v1/jobs",
        "/v1/results/{id}/{name}",
        "/health",
        "/healthz",
        "/readyz",
        "/metrics",
    } <= {path for path, _, _ in operations()}


def test_good_answers_are_in_the_document_too(served: Served) -> None:
    """What random requests do not reach: handles, ended jobs, pictures."""
    import jsonschema_rs

    document = json.loads(FILE.read_text())

    def check(answer: Any, path: str, method: str = "get") -> Any:
        described = document["paths"][path][method]["responses"][str(answer.status_code)]
        wanted = described["content"]["application/json"]["schema"]
        jsonschema_rs.validate({**wanted, "components": document["components"]}, answer.json())
        return answer.json()

    handle = check(served.http.post("/v1/references", json={"images": [text(png())]}), "/v1/references", "post")
    check(served.http.get(f"/v1/references/{handle['id']}"), "/v1/references/{id}")
    check(served.http.get("/v1/references"), "/v1/references")
    body = {"prompt": "a", "references": handle["id"]}
    job = check(served.http.post("/v1/edit", json=body), "/v1/edit", "post")["id"]
    served.poll(job)
    found = check(served.http.get("/v1/get_result", params={"id": job}), "/v1/get_result")
    assert found["status"] == "Ready"
    check(served.http.get(f"/v1/jobs/{job}"), "/v1/jobs/{id}")
    check(served.http.get("/v1/jobs"), "/v1/jobs")
    check(served.http.delete(f"/v1/jobs/{job}"), "/v1/jobs/{id}", "delete")
    check(
        served.http.post("/v1/images/generations", json={"prompt": "a", "size": "64x64"}),
        "/v1/images/generations",
        "post",
    )
    check(served.http.delete(f"/v1/references/{handle['id']}"), "/v1/references/{id}", "delete")
