"""What programs made for other services send, as they send it: followed, or named in `without_effect`.

Sources: @ai-sdk/black-forest-labs 1.0, the official Python client (blackforest 0.1), ComfyUI's API nodes, LibreChat,
vLLM-Omni and SGLang. The programs themselves run in `test_clients.py`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.support.serving import Served, png, text, types

from limner import Pipeline
from limner.outbound.urls import Origin
from limner.server.http.aspect import size_of_aspect

NAME = "/v1/flux-2-klein-9b"
EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(Pipeline.from_pretrained(tiny_folder), tmp_path_factory.mktemp("clients") / "data") as served:
        yield served


def transparent(colour: tuple[int, int, int], alpha: int, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, (*colour, alpha)).save(buffer, "PNG")
    return buffer.getvalue()


def half_mask(size: tuple[int, int], *, kind: str) -> bytes:
    """The left half is to be drawn: transparent, or white."""
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    colour = (0, 0, 0, 0) if kind == "transparent" else (255, 255, 255, 255)
    image.paste(colour, (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    (image if kind == "transparent" else image.convert("L")).save(buffer, "PNG")
    return buffer.getvalue()


# The hosted dialect

AI_SDK = {"aspect_ratio": "4:5", "width": 64, "height": 80, "output_format": "png", "prompt_upsampling": False}
AI_SDK_ALL = {
    "width": 64,
    "height": 64,
    "steps": 2,
    "guidance": 2.5,
    "image_prompt_strength": 0.1,
    "image_prompt": "aGVsbG8=",
    "output_format": "jpeg",
    "prompt_upsampling": True,
    "raw": True,
    "safety_tolerance": 6,
}
OFFICIAL = {  # FluxProInputs and FluxKontextProInputs
    "width": 64,
    "height": 64,
    "seed": None,
    "safety_tolerance": 2,
    "output_format": "jpeg",
    "prompt_upsampling": False,
    "image_prompt": None,
    "steps": 3,
    "guidance": 2.5,
    "interval": 2.0,
}
COMFYUI = {  # Flux2ProGenerateRequest, nulls and all
    "width": 64,
    "height": 64,
    "seed": 1,
    "prompt_upsampling": None,
    **{f"input_image_{i}": None for i in range(2, 10)},
    "input_image": None,
    "safety_tolerance": 5,
    "output_format": "png",
}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (AI_SDK, []),
        (
            AI_SDK_ALL,
            ["safety_tolerance", "guidance", "prompt_upsampling", "raw", "image_prompt", "image_prompt_strength"],
        ),
        (OFFICIAL, ["guidance", "interval"]),
        (COMFYUI, []),
        ({"width": 64, "height": 64, "transparent_bg": False, "disable_pup": True, "sync": False}, []),
        ({"width": 64, "height": 64, "transparent_bg": True, "disable_pup": False}, ["disable_pup", "transparent_bg"]),
        ({"width": 64, "height": 80, "aspect_ratio": "16:9"}, ["aspect_ratio"]),
    ],
)
def test_bodies_of_the_hosted_service(served: Served, body: dict[str, Any], names: list[str]) -> None:
    answer = served.http.post(NAME, json={"prompt": "a rocket", **body})
    assert answer.status_code == 200, answer.text
    assert answer.json().get("without_effect", []) == names
    found = served.poll(answer.json()["id"])
    assert found["status"] == "Ready"
    assert found["result"]["limner"].get("without_effect", []) == names
    assert (found["result"]["width"], found["result"]["height"]) == (body["width"], body["height"])
    job = served.http.get(f"/v1/jobs/{answer.json()['id']}").json()
    assert job["num_inference_steps"] == body.get("steps", 4)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"aspect_ratio": "1:1"}, (128, 128)),
        ({"aspect_ratio": "2:1"}, (176, 96)),
        ({"aspect_ratio": "1:2"}, (96, 176)),
        ({"aspect_ratio": "8:1"}, (512, 64)),
        ({"aspect_ratio": "4:3", "width": 128}, (128, 96)),
        ({"aspect_ratio": "16:9", "height": 80, "width": 0}, (144, 80)),
        ({"aspect_ratio": "2:1", "input_image": True}, (128, 64)),
    ],
)
def test_aspect_ratio_gives_the_size(
    served: Served, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], size: tuple[int, int]
) -> None:
    monkeypatch.setattr(served.engine.pipe, "default_size", (128, 128))
    if "input_image" in asked:
        asked = {**asked, "input_image": text(png(96, 64))}
    answer = served.http.post(NAME, json={"prompt": "a rocket", "steps": 1, **asked})
    assert answer.status_code == 200, answer.text
    result = served.poll(answer.json()["id"])["result"]
    assert (result["width"], result["height"]) == size
    assert "without_effect" not in answer.json()


def test_aspect_ratio_takes_a_size_that_the_model_has_learned() -> None:
    learned = [(128, 128), (160, 96), (96, 160)]

    def size(text: str) -> tuple[int, int]:
        width, height = map(int, text.split(":"))
        return size_of_aspect(Fraction(width, height), width=None, height=None, like=(128, 128), learned=learned)

    assert [size(text) for text in ("16:9", "9:16", "1:1", "5:3")] == [(160, 96), (96, 160), (128, 128), (160, 96)]
    assert size("4:3") == (144, 112)  # none of those is near
    for asked in ("21:9", "9:21", "3:2", "8:1", "1:8", "7:5"):
        width, height = size(asked)
        one, other = map(int, asked.split(":"))
        assert width % 16 == height % 16 == 0
        assert abs(width - height * one / other) < 16 or abs(height - width * other / one) < 16


def test_ten_pictures_are_taken(served: Served) -> None:
    fields = ["input_image", *(f"input_image_{i}" for i in range(2, 11))]
    body = {name: text(png(64, 64, seed=i)) for i, name in enumerate(fields)}
    answer = served.http.post(NAME, json={"prompt": "a", "width": 64, "height": 64, "steps": 1, **body})
    found = served.poll(answer.json()["id"])
    assert len(found["result"]["limner"]["references"]) == 10


# Transparent references


@pytest.mark.parametrize("colour", ["white", "#fff"])
def test_what_stands_behind_a_transparent_picture(served: Served, colour: str) -> None:
    clear = transparent((200, 0, 0), 0)
    white = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(white, "PNG")
    wanted = served.http.post("/v1/references", json={"images": [text(white.getvalue())]}).json()["id"]
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (NAME, "input_image", {"json": {"prompt": "a", "input_image": text(clear)}}),
        (EDITS, "image", {"data": {"prompt": "a"}, "files": {"image": ("a.png", clear)}}),
        (EDITS, "images[0].image_url", {"json": {"prompt": "a", "images": [{"image_url": text(clear)}]}}),
        ("/v1/references", "images[0]", {"json": {"images": [text(clear)]}}),
        ("/v1/references", "image", {"data": {"prefill": "true"}, "files": {"image": ("a.png", clear)}}),
    ]
    for path, field, body in cases:
        answer = served.http.post(path, **body)
        if path == EDITS:
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field)
            message = error["message"]
        else:
            assert (answer.status_code, types(answer)) == (422, [("body", field)])
            message = answer.json()["detail"][0]["msg"]
        assert "background" in message
        assert "ReferencePolicy" not in message
        assert "--" not in message
        content = "json" if "json" in body else "data"
        answer = served.http.post(path, **{**body, content: {**body[content], "background": colour}})
        assert answer.status_code in (200, 201), answer.text
        if path == NAME:
            told = served.poll(answer.json()["id"])["result"]["limner"]["reference_key"]
        else:
            told = answer.json()["limner"]["reference_key"] if path == EDITS else answer.json()["id"]
        assert told == wanted


# The OpenAI dialect


def edit(served: Served, *, files: Any = None, **fields: Any) -> httpx.Response:
    return served.http.post(EDITS, data={"prompt": "a", **fields}, files=files)


def test_names_of_pictures_in_a_form(served: Served) -> None:
    one, two = ("a.png", png(80, 64, seed=1), "image/png"), ("b.png", png(64, 64, seed=2), "image/png")
    wanted = [[80, 64], [64, 64]]
    data = "data:image/png;base64,"
    for files in (
        [("image[0]", one), ("image[1]", two)],
        [("image[1]", two), ("image[0]", one)],
        [("images[]", one), ("images[]", two)],
        [("image", one), ("image[]", two)],
        [("url", (None, data + text(one[1]))), ("url[]", (None, data + text(two[1])))],
        [("image", one), ("url[]", (None, data + text(two[1])))],
    ):
        answer = edit(served, files=files)
        assert answer.status_code == 200, (files[0][0], answer.text)
        assert [r["original_size"] for r in answer.json()["limner"]["references"]] == wanted, files[0][0]
    answer = edit(served, files=[("image[0]", one), ("image[0]", two)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image[0]")
    answer = edit(served, files=[("image[0]", one), ("image[1]", ("b.png", b"none"))])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image[1]")
    answer = edit(served, files=[("url", (None, "https://example.org/a.png"))])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")
    answer = edit(served, files=[("imagine", one)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "imagine")


def test_pictures_in_json(served: Served) -> None:
    one, two = "data:image/png;base64," + text(png(80, 64, seed=1)), text(png(64, 64, seed=2))
    wanted = [[80, 64], [64, 64]]
    for pictures in (
        {"images": [{"image_url": one}, {"image_url": two}]},
        {"images": [{"image_url": {"url": one}}, two]},
        {"image": [one, two]},
        {"image": one, "url": [two]},
    ):
        answer = served.http.post(EDITS, json={"prompt": "a", **pictures})
        assert answer.status_code == 200, answer.text
        assert [r["original_size"] for r in answer.json()["limner"]["references"]] == wanted
    for body, param in (
        ({"images": [{"file_id": "file-1"}]}, "images[0].file_id"),
        ({"images": [{}]}, "images[0].image_url"),
        ({"images": [{"image_url": one}, {"image_url": "data:image/png;base64,AAAA"}]}, "images[1].image_url"),
        ({"images": [{"image_url": one}, {"image_uri": two}]}, "images[1].image_uri"),
        ({"images": [{"image_url": "https://example.org/a.png"}]}, "images[0].image_url"),
        ({"images": 3}, "images"),
        ({"image": [one, "AAAA"]}, "image[1]"),
        ({}, "images"),
        ({"images": [one], "size": "70x64"}, "size"),
        ({"images": [one], "n": "1"}, "n"),
        ({"images": [one] * 17}, "images"),
    ):
        answer = served.http.post(EDITS, json={"prompt": "a", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    answer = served.http.post(EDITS, content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)


LIBRECHAT = {
    "model": "gpt-image-1",
    "quality": "auto",
    "size": "auto",
    "background": "auto",
    "output_format": "png",
    "n": 1,
}
OMNI = {
    "size": "64x64",
    "n": 1,
    "response_format": "b64_json",
    "user": "me",
    "layers": None,
    "negative_prompt": "blurry",
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "true_cfg_scale": 4.0,
    "seed": 42,
    "generator_device": "cuda",
    "vae_use_slicing": False,
    "vae_use_tiling": True,
    "output_format": "webp",
}
SGLANG = {
    "width": 64,
    "height": 80,
    "enable_teacache": False,
    "output_quality": "default",
    "negative_prompt": "",
    "style": "vivid",
}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (LIBRECHAT, []),
        ({"model": "dall-e-2", "output_compression": 100, "size": "64x64", "quality": "hd"}, ["quality"]),
        (OMNI, ["negative_prompt", "guidance_scale", "true_cfg_scale", "generator_device", "vae_use_tiling"]),
        (SGLANG, ["style"]),
        (
            {"quality": "xhigh", "complexity": "high", "safety_identifier": "x", "background": "opaque"},
            ["quality", "complexity"],
        ),
    ],
)
def test_bodies_of_the_openai_dialect(served: Served, body: dict[str, Any], names: list[str]) -> None:
    answer = served.http.post("/v1/images/generations", json={"prompt": "a rocket", **body})
    assert answer.status_code == 200, answer.text
    told = answer.json()["limner"]
    assert told.get("without_effect", []) == names
    assert told["model"] == "limner-stickers"  # whatever name was asked for
    assert told["seeds"] == [body["seed"]] if "seed" in body else True
    if "width" in body:
        assert answer.json()["size"] == f"{body['width']}x{body['height']}"
    form = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in body.items()
        if value is not None
    }
    answer = edit(served, files=[("image", ("a.png", png()))], **form)  # the same as a form, where all is text
    assert answer.status_code == 200, answer.text
    assert answer.json()["limner"].get("without_effect", []) == names


def test_errors_have_the_names_of_the_caller(served: Served) -> None:
    def error(**body: Any) -> tuple[str, str]:
        answer = served.http.post("/v1/images/generations", json={"prompt": "a", **body})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["param"], answer.json()["error"]["message"]

    for body, param in (
        ({"n": 10, "size": "64x64", "num_inference_steps": 51}, "num_inference_steps"),
        ({"size": "64x72"}, "size"),
        ({"size": "9008x9008"}, "size"),
        ({"width": 72, "height": 64}, "width"),
        ({"width": 64, "size": "80x64"}, "width"),
        ({"output_compression": 99}, "output_compression"),
        ({"background": "nocolour"}, "background"),
    ):
        found, message = error(**body)
        assert found == param
        assert "num_images" not in message
    answer = served.http.post(NAME, json={"prompt": "a", "input_image": text(b"none"), "steps": 2})
    assert types(answer) == [("body", "input_image")]


def test_names_of_the_model(pipe: Pipeline, tmp_path: Path) -> None:
    own = ["limner-stickers", "flux-2-klein-9b-preview", "flux-2-klein-9b", "flux-2-klein-4b"]
    for served_names, shown, taken, refused in (
        ((), own, ["gpt-image-1", "dall-e-3", "chatgpt-image-latest"], ["gpt-4o", "sdxl"]),
        (("lab/klein", "draw"), ["lab/klein", "draw", *own[1:]], ["lab/klein", "draw"], ["gpt-image-1", own[0]]),
    ):
        name = served_names[0] if served_names else own[0]
        with Served(pipe, tmp_path / name, model_name=name, served_names=served_names) as served:
            assert [entry["id"] for entry in served.http.get("/v1/models").json()["data"]] == shown
            for one in (*shown, *taken):
                assert served.http.get(f"/v1/models/{one}").json()["id"] == one
            for one in refused:
                assert served.http.get(f"/v1/models/{one}").status_code == 404
                answer = served.http.post("/v1/images/generations", json={"prompt": "a", "model": one})
                assert answer.status_code == 404
                assert name in answer.json()["error"]["message"]
            body = {"prompt": "a", "model": taken[-1], "size": "64x64", "num_inference_steps": 1}
            answer = served.http.post("/v1/images/generations", json=body)
            assert answer.json()["limner"]["model"] == name


# Browsers and health

PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def test_pages_of_other_origins(pipe: Pipeline, tmp_path: Path) -> None:
    path, page = "/v1/images/generations", "https://app.example"
    body = {"prompt": "a", "size": "64x64", "num_inference_steps": 1}

    def allowed(answer: httpx.Response) -> str | None:
        assert "access-control-allow-credentials" not in answer.headers
        return answer.headers.get("access-control-allow-origin")

    with Served(pipe, tmp_path / "off") as served:
        answer = served.http.options(path, headers={"origin": "http://localhost:3000", **PREFLIGHT})
        assert (answer.status_code, allowed(answer)) == (204, None)
        assert "POST" in answer.headers["allow"]
        assert served.http.options("/v1/nothing").status_code == 404
        answer = served.http.post(path, json=body, headers={"origin": page})
        assert (answer.status_code, allowed(answer)) == (400, None)
    origins = frozenset({Origin.parse(page), Origin.parse("http://localhost:3000")})
    with Served(pipe, tmp_path / "on", browser_origins=origins) as served:
        for origin in (page, "http://localhost:3000"):
            answer = served.http.options(path, headers={"origin": origin, **PREFLIGHT})
            assert (answer.status_code, allowed(answer)) == (200, origin)
            assert "authorization" in answer.headers["access-control-allow-headers"]
            answer = served.http.post(path, json=body, headers={"origin": origin})
            assert (answer.status_code, allowed(answer)) == (200, origin)
            assert "Origin" in answer.headers["vary"]
            answer = served.http.post(
                path, content=b"{", headers={"origin": origin, "content-type": "application/json"}
            )
            assert (answer.status_code, allowed(answer)) == (400, origin)  # a page can read why
        for origin in ("https://other.example", "null", "http://app.example", "https://app.example:8443"):
            answer = served.http.options(path, headers={"origin": origin, **PREFLIGHT})
            assert (answer.status_code, allowed(answer)) == (400, None)
            assert served.http.post(path, json=body, headers={"origin": origin}).status_code == 400


def test_health_as_others_have_it(pipe: Pipeline, tmp_path: Path) -> None:
    with Served(pipe, tmp_path / "data") as served:
        assert served.http.get("/health").status_code == 200
        served.service.ready = False
        assert served.http.get("/health").status_code == 503
        served.service.ready = True
