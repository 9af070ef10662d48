"""The OpenAI Images dialect, through the official client, unchanged."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tests.support.serving import ANNA, BOB, KEYS, Served, Words, opened, png
from tests.support.tiny import Gate

from limner import Pipeline
from limner.engine import Engine
from limner.model.preview import LatentPreview
from limner.server.access.limits import LimitPolicy
from limner.trust.safety import Checks


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pipe = Pipeline.from_pretrained(tiny_folder)
    weights = torch.randn(12, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(0))
    pipe.latent_preview = LatentPreview(0.1 * weights, torch.full((12,), 0.5))
    words = Words()
    folder = tmp_path_factory.mktemp("openai") / "data"
    with Served(pipe, folder, keys=KEYS, checks=Checks(checks=(words,))) as served:
        served.words = words  # type: ignore[attr-defined]
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=ANNA, max_retries=0) as client:
        yield client


def shown(image: Any) -> Any:
    return opened(base64.b64decode(image.b64_json))


def test_generate(client: openai.OpenAI) -> None:
    found = client.images.generate(prompt="a red ball", n=2, size="64x80", extra_body={"seed": 4})
    assert [shown(image).size for image in found.data or []] == [(64, 80)] * 2
    assert shown(found.data[0]).format == "PNG"
    assert (found.size, found.output_format, found.background) == ("64x80", "png", "opaque")
    assert abs(found.created - time.time()) < 600
    assert found.usage.output_tokens == 2 * 20
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.limner["seeds"] == [4, 5]  # type: ignore[attr-defined]
    assert found.limner["reference_cache"] == "none"  # type: ignore[attr-defined]
    again = client.images.generate(prompt="a red ball", size="64x80", extra_body={"seed": 4})
    # a batch of one sums in another order than a batch of two
    assert found.data[0].b64_json[:100] == again.data[0].b64_json[:100]


def test_edit_with_several_pictures(client: openai.OpenAI) -> None:
    pictures = [("a.png", png(80, 64)), ("b.jpg", png(seed=1, format="JPEG")), ("c.webp", png(seed=2, format="WEBP"))]
    found = client.images.edit(image=pictures, prompt="join them", output_format="webp", output_compression=40)
    assert shown(found.data[0]).size == (80, 64)
    assert shown(found.data[0]).format == "WEBP"
    told = found.limner  # type: ignore[attr-defined]
    assert [report["original_size"] for report in told["references"]] == [[80, 64], [64, 64], [64, 64]]
    assert (told["reference_cache"], told["seconds_saved"]) == ("miss", 0.0)
    assert found.usage.input_tokens_details.image_tokens == 20 + 16 + 16
    found = client.images.edit(image=pictures, prompt="once more", quality="high", input_fidelity="high")
    told = found.limner  # type: ignore[attr-defined]
    assert told["reference_cache"] == "memory"
    assert told["seconds_saved"] > 0
    assert told["without_effect"] == ["quality", "input_fidelity"]
    one = client.images.edit(image=io.BytesIO(png(96, 64)), prompt="one")
    assert shown(one.data[0]).size == (96, 64)


def test_sizes_that_the_model_has_learned(
    client: openai.OpenAI, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, sizes = served.engine.pipe, ((64, 64), (96, 64))
    monkeypatch.setattr(pipe, "sizes", sizes)
    monkeypatch.setattr(pipe, "reference_policy", replace(pipe.reference_policy, sizes=sizes))
    found = client.images.edit(image=io.BytesIO(png(150, 90)), prompt="a", size="auto")
    told = found.limner  # type: ignore[attr-defined]
    assert (found.size, told["warnings"], told["references"][0]["cut"]) == ("96x64", [], [5, 0, 6, 0])
    found = client.images.edit(image=io.BytesIO(png(150, 90)), prompt="a", size="64x96")  # type: ignore[arg-type]
    told = found.limner  # type: ignore[attr-defined]
    assert found.size == "64x96"
    assert told["warnings"] == [
        "size: 64x96 is not a size that this model has learned to draw: 64x64, 96x64; "
        'give "size": "64x64", or leave it out'
    ]


def test_urls(client: openai.OpenAI) -> None:
    found = client.images.generate(prompt="a", response_format="url", size="64x64", n=2, output_format="jpeg")
    for image in found.data:
        assert image.b64_json is None
        assert opened(httpx.get(image.url).content).format == "JPEG"


def test_streaming(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(prompt="a", size="64x64", stream=True, partial_images=2, extra_body={"seed": 1})
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    assert all(shown(event).size == (64, 64) for event in events)
    assert events[-1].usage.total_tokens > 0
    assert events[-1].size == "64x64"
    plain = client.images.generate(prompt="a", size="64x64", extra_body={"seed": 1})
    assert events[-1].b64_json == plain.data[0].b64_json
    edits = client.images.edit(image=png(), prompt="a", stream=True, partial_images=1, n=2)
    kinds = [event.type for event in edits]
    assert kinds == ["image_edit.partial_image", "image_edit.completed", "image_edit.completed"]


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["limner-stickers", "flux-2-klein-9b-preview", "flux-2-klein-9b", "flux-2-klein-4b"]
    assert client.models.retrieve(names[1]).id == names[1]
    assert client.images.generate(model=names[0], prompt="a", size="64x64").data
    for call in (lambda: client.models.retrieve("other"), lambda: client.images.generate(model="other", prompt="a")):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.type == "not_found_error"


def test_errors(client: openai.OpenAI, served: Served) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong-key-0123456789", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError) as denied,
    ):
        other.images.generate(prompt="a")
    assert denied.value.type == "authentication_error"
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as other:
        other.models.list()
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 32001}, "prompt"),
        ({"size": "1024"}, "size"),
        ({"size": "72x64"}, "size"),
        ({"size": "9000x9000"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "png", "output_compression": 50}, "output_compression"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"extra_body": {"guidance": 2}}, "guidance"),
        ({"extra_body": {"seed": "1"}}, "seed"),
        ({"extra_body": {"input_fidelity": "high"}}, "input_fidelity"),
    ]
    for fields, param in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(**{"prompt": "a", **fields})
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error"), fields
    for fields, param in (
        ({"image": b"no picture"}, "image"),
        ({"image": [("a.png", png()), ("b.png", b"no picture")]}, "image[]"),
        ({"mask": png()}, "mask"),
        ({"extra_body": {"seed": "x"}}, "seed"),
        ({"n": 11}, "n"),
        ({"prompt": ""}, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"prompt": "a", "image": png(), **fields})
        assert caught.value.param == param, fields
    answer = served.http.post("/v1/images/edits", data={"prompt": "a"}, files={"other": b""})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "other")
    answer = served.http.post("/v1/images/generations", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)


def test_moderated(client: openai.OpenAI, served: Served) -> None:
    words = served.words  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="forbidden")
    assert caught.value.code == "moderation_blocked"
    words.refuse = {"output"}
    try:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a", size="64x64")
        assert caught.value.code == "moderation_blocked"
        events = client.images.generate(prompt="a", size="64x64", stream=True)
        with pytest.raises(openai.APIError, match="output is refused") as told:
            list(events)
        assert told.value.code == "moderation_blocked"
        words.refuse = {"input"}
        with pytest.raises(openai.BadRequestError, match="input is refused"):
            client.images.edit(image=png(seed=79), prompt="a")  # one that has not passed before
    finally:
        words.refuse = set()


def test_too_much_at_once(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Served(pipe, tmp_path / "data", keys=KEYS, limits=LimitPolicy(burst=2, requests_per_minute=30)) as served:
        url = f"{served.url}/v1"
        with openai.OpenAI(base_url=url, api_key=BOB, max_retries=0) as client:
            for _ in range(2):
                client.images.generate(prompt="a", size="64x64")
            with pytest.raises(openai.RateLimitError) as caught:
                client.images.generate(prompt="a", size="64x64")
            assert caught.value.type == "rate_limit_error"
            assert int(caught.value.response.headers["retry-after"]) in (1, 2)
            client.models.list()  # reading is not counted


def waits_for(served: Served, status: str, num: int = 1) -> None:
    end = time.monotonic() + 60
    while served.service.jobs.counts().get(status, 0) < num:
        assert time.monotonic() < end, served.service.jobs.counts()
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_goes_away_frees_the_device(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with Served(pipe, tmp_path / "data") as served:
        reached, go_on, call, steps = threading.Event(), threading.Event(), Engine._drop_stopped, []

        def held(own: Engine, going: Any) -> list[int]:
            steps.append(1)
            reached.set()
            if len(steps) == 2:
                assert go_on.wait(60)
            return call(own, going)

        monkeypatch.setattr(Engine, "_drop_stopped", held)
        body = {"prompt": "a", "size": "64x64", "stream": stream, "num_inference_steps": 50}
        with pytest.raises(httpx.ReadTimeout):  # reads the whole stream, too
            httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=3)
        assert reached.wait(60)
        end = time.monotonic() + 60
        while not any(live.cancelled for live in served.service.runner._live.values()):  # told of the loss
            assert time.monotonic() < end
            time.sleep(0.02)
        go_on.set()
        waits_for(served, "cancelled")
        assert len(steps) == 2
        while served.service.runner._live:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_caller_with_an_idempotency_key_may_come_back(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with Served(pipe, tmp_path / "data") as served:
        url, key = f"{served.url}/v1/images/generations", {"Idempotency-Key": "once"}
        body = {"prompt": "a", "size": "64x64"}
        gate.shut()
        for stream in (True, False):
            with (
                pytest.raises(httpx.ReadTimeout),
                httpx.stream("POST", url, json={**body, "stream": stream}, headers=key, timeout=0.3) as answer,
            ):
                answer.read()
        time.sleep(0.4)  # until the server has seen it
        gate.open()
        answer = httpx.post(url, json=body, headers=key, timeout=60)
        assert answer.status_code == 200
        assert served.service.jobs.counts() == {"ready": 1}
        again = httpx.post(url, json=body, headers=key, timeout=60)
        assert again.json()["data"] == answer.json()["data"]
        other = httpx.post(url, json={**body, "prompt": "b"}, headers=key)
        assert (other.status_code, other.json()["error"]["type"]) == (409, "invalid_request_error")


def test_a_form_is_read_strictly(served: Served) -> None:
    def sent(files: Any, **fields: Any) -> tuple[int, Any]:
        answer = served.http.post("/v1/images/edits", data={"prompt": "a", **fields}, files=files)
        return answer.status_code, answer.json().get("error", {}).get("param")

    file = ("a.png", png(), "image/png")
    assert sent([("image", file)]) == (200, None)
    assert sent([("image[]", file), ("image[]", file)], n="1", stream="false")[0] == 200
    assert sent([("image", file)], seed="9", output_format="jpeg")[0] == 200
    assert sent([("image", file)], prompt=["a", "b"]) == (400, "prompt")
    assert sent([("image", file)], n="one") == (400, "n")
    assert sent([("image", file)], n="1.5") == (400, "n")
    assert sent([("image", file)], unknown="1") == (400, "unknown")
    assert sent([("image", (None, "text"))]) == (400, "image")
    assert sent([]) == (400, "body")  # urlencoded
    assert sent([("image", file)] * 17)[0] == 400
    assert sent([("image", file)] * 21)[0] == 400
    assert json.loads(served.http.get("/v1/models").text)["object"] == "list"
