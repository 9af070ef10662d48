"""Guidance over HTTP: base models follow it in both dialects; of distilled ones it is named in `without_effect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.serving import Served, png, text

from limner import Pipeline
from limner.images import read_metadata

SIZE = {"width": 64, "height": 64, "seed": 3}


@pytest.fixture(scope="module")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pipe = Pipeline.from_pretrained(base_folder)
    with Served(pipe, tmp_path_factory.mktemp("base") / "data") as served:
        yield served


@pytest.fixture(scope="module")
def distilled(standard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(Pipeline.from_pretrained(standard_folder), tmp_path_factory.mktemp("standard") / "data") as served:
        yield served


def drawn(served: Served, **body: Any) -> tuple[bytes, dict[str, Any]]:
    """The picture of /v1/edit, and the submit answer."""
    sent = {"prompt": "a dog", "output_format": "png", "input_image": text(png()), **SIZE, **body}
    answer = served.http.post("/v1/edit", json=sent)
    assert answer.status_code == 200, answer.text
    result = served.poll(answer.json()["id"])
    assert result["status"] == "Ready", result
    return served.http.get(result["result"]["sample"]).content, answer.json()


def test_capabilities_say_the_kind(base: Served, distilled: Served) -> None:
    for served, expected in ((base, (False, 50, 4.0)), (distilled, (True, 4, 1.0))):
        found = served.http.get("/v1/capabilities").json()
        assert found["references_attention"] == "joint"
        assert (found["is_distilled"], found["num_inference_steps"], found["guidance_scale"]) == expected


def test_base_models_follow_guidance(base: Served) -> None:
    plain, answer = drawn(base, steps=2, guidance=1.0)
    assert "without_effect" not in answer
    guided, _ = drawn(base, steps=2, guidance=3.0)
    negative, _ = drawn(base, steps=2, guidance=3.0, negative_prompt="rain")
    assert len({plain, guided, negative}) == 3
    assert read_metadata(guided)["guidance_scale"] == 3.0
    body = {"prompt": "a dog", "size": "64x64", "seed": 3, "num_inference_steps": 2}
    pictures = {
        served.http.post("/v1/images/generations", json={**body, **more}).json()["data"][0]["b64_json"]
        for served in (base,)
        for more in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 3.0},
            {"guidance_scale": 3.0, "negative_prompt": "rain"},
        )
    }
    assert len(pictures) == 3
    entry = base.http.get("/v1/jobs").json()["data"][0]
    assert (entry["guidance_scale"], entry["negative_prompt"]) == (3.0, "rain")


def test_distilled_models_name_it(distilled: Served) -> None:
    plain, _ = drawn(distilled)
    asked, answer = drawn(distilled, guidance=3.0, negative_prompt="rain")
    assert set(answer["without_effect"]) == {"guidance", "negative_prompt"}
    assert asked == plain
    body = {"prompt": "a dog", "size": "64x64", "seed": 3, "guidance_scale": 3.0}
    assert distilled.http.post("/v1/images/generations", json=body).json()["limner"]["without_effect"] == [
        "guidance_scale"
    ]


def test_what_is_refused(base: Served) -> None:
    for body, field in (({"guidance": -1}, "guidance"), ({"negative_prompt": "a\0b"}, "negative_prompt")):
        answer = base.http.post("/v1/edit", json={"prompt": "a dog", **SIZE, **body})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"][-1] == field
