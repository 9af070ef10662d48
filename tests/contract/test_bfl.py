"""The hosted dialect: names, statuses, shapes of errors, signed URLs, limits, webhooks."""

from __future__ import annotations

import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest
import torch
from tests.support.serving import ANNA, BOB, KEYS, SIZE, Served, Words, opened, png, text, types
from tests.support.tiny import Gate

from limner import Pipeline
from limner.engine import Engine
from limner.model.preview import LatentPreview
from limner.outbound.policy import OutboundPolicy
from limner.outbound.urls import Origin
from limner.server.access.limits import LimitPolicy
from limner.server.jobs.settings import RunnerSettings
from limner.server.jobs.webhooks import Delivery, verify
from limner.trust.safety import Checks


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pipe = Pipeline.from_pretrained(tiny_folder)
    weights = torch.randn(12, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(0))
    pipe.latent_preview = LatentPreview(0.1 * weights, torch.full((12,), 0.5))
    words = Words()
    with Served(pipe, tmp_path_factory.mktemp("bfl") / "data", checks=Checks(checks=(words,))) as served:
        served.words = words  # type: ignore[attr-defined]
        yield served


def test_every_name_submits_polls_and_fetches(served: Served) -> None:
    body = {"input_image": text(png(96, 64)), "input_image_2": text(png(seed=1)), "seed": 7}
    pictures = set()
    for name in ("flux-2-klein-9b-preview", "flux-2-klein-9b", "flux-2-klein-4b", "edit"):
        answer = served.submit(f"/v1/{name}", **body, output_format="png")
        assert set(answer) == {"id", "polling_url", "input_mp", "output_mp"}
        assert (answer["input_mp"], answer["output_mp"]) == (0.0102, 0.0041)
        assert answer["polling_url"] == f"{served.url}/v1/get_result?id={answer['id']}"
        found = served.poll(answer["id"])
        assert (found["status"], found["progress"], found["result"]["seed"]) == ("Ready", 1.0, 7)
        sample = served.http.get(found["result"]["sample"])
        assert sample.headers["content-type"] == "image/png"
        assert opened(sample.content).size == (64, 64)
        pictures.add(opened(sample.content).tobytes())
    assert len(pictures) == 1


def test_defaults_are_those_of_the_hosted_service(served: Served) -> None:
    found = served.poll(served.submit("/v1/flux-2-klein-9b", input_image=text(png(80, 96)), width=0, height=0)["id"])
    assert (found["result"]["width"], found["result"]["height"]) == (80, 96)
    sample = httpx.get(found["result"]["sample"])  # no key
    assert sample.headers["content-type"] == "image/jpeg"
    assert opened(sample.content).format == "JPEG"


def test_a_task_that_is_not_there(served: Served) -> None:
    for id_ in ("nothing", "", "0" * 200, "../../etc/passwd", "\x00", "a%00b"):
        answer = served.http.get("/v1/get_result", params={"id": id_})
        assert answer.status_code == 404
        assert (answer.json()["status"], answer.json()["result"]) == ("Task not found", None)
    assert served.http.get("/v1/get_result").status_code == 422


def test_pending_tells_progress_and_shows_a_preview(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on, call, steps = threading.Event(), threading.Event(), Engine._drop_stopped, []

    def held(own: Engine, going: Any) -> list[int]:
        steps.append(1)
        if len(steps) == 3:  # two steps were told
            reached.set()
            assert go_on.wait(60)
        return call(own, going)

    monkeypatch.setattr(Engine, "_drop_stopped", held)
    id_ = served.submit(num_images=2)["id"]
    assert reached.wait(60)
    end = time.monotonic() + 60
    while (found := served.http.get("/v1/get_result", params={"id": id_}).json())["progress"] != 0.4:
        assert time.monotonic() < end
    go_on.set()
    assert found["status"] == "Pending"
    assert found["details"] == {"state": "running", "step": 2, "num_steps": 4}
    assert found["result"] is None
    shown = found["preview"]["images"]
    assert len(shown) == 2
    assert all(image.startswith("data:image/png;base64,") for image in shown)
    assert served.poll(id_)["status"] == "Ready"


def test_moderated(served: Served) -> None:
    words = served.words  # type: ignore[attr-defined]
    before = served.files("inputs"), served.files("results")
    picture = text(png(seed=77))
    found = served.draw(prompt="a forbidden thing", input_image=picture)
    assert (found["status"], found["result"]) == ("Request Moderated", None)
    assert found["details"] == {"Moderation Reasons": ["prompt"], "reason": "The prompt is refused."}
    words.refuse = {"input"}
    assert served.draw(input_image=picture)["details"]["Moderation Reasons"] == ["input"]
    words.refuse = {"output"}
    found = served.draw(input_image=picture)
    words.refuse = set()
    assert (found["status"], found["result"]) == ("Content Moderated", None)
    assert found["details"]["Moderation Reasons"] == ["output"]
    assert (served.files("inputs"), served.files("results")) == before


def test_references_that_passed_are_not_looked_at_again(served: Served) -> None:
    words = served.words  # type: ignore[attr-defined]
    mine, other = text(png(seed=81)), text(png(seed=82))
    before = words.looked

    def looked(**body: Any) -> int:
        assert served.draw(**body)["status"] == "Ready"
        return int(words.looked - before)

    assert looked(input_image=mine) == 1
    assert looked(input_image=mine, prompt="another prompt") == 1
    assert looked(input_image=mine, safety_tolerance=0) == 2
    assert looked(input_image=mine, input_image_2=other) == 4
    words.refuse = {"input"}
    third = text(png(seed=83))
    for _ in range(2):  # what was refused is refused again
        assert served.draw(input_image=third)["status"] == "Request Moderated"
    words.refuse = set()
    assert words.looked - before == 6


def test_the_picture_of_a_refused_job_stays_where_another_has_it(served: Served) -> None:
    before = set(served.files("inputs"))
    picture = text(png(seed=78))
    assert served.draw(input_image=picture)["status"] == "Ready"
    kept = set(served.files("inputs"))
    assert len(kept - before) == 1
    assert served.draw(input_image=picture, prompt="forbidden")["status"] == "Request Moderated"
    assert set(served.files("inputs")) == kept


def test_error(served: Served) -> None:
    found = served.draw(timeout=1e-6)
    assert (found["status"], found["details"]["type"]) == ("Error", "deadline")
    assert "not done in time" in found["details"]["error"]


def test_a_report_belongs_to_the_upload_that_it_is_of(served: Served) -> None:
    """Two files with the same pixels after cropping are one picture, and two stories."""
    whole = opened(png(64, 64, seed=5))
    wide = whole.resize((70, 64))
    wide.paste(whole, (3, 0))  # what is cut to 64x64 is the first picture again
    files = [whole, wide]
    found = []
    for image in (*files, *files):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append(served.draw(input_image=text(buffer.getvalue()))["result"]["limner"])
    assert [f["references"][0]["original_size"] for f in found] == [[64, 64], [70, 64]] * 2
    assert [f["references"][0]["cut"] for f in found] == [[0, 0, 0, 0], [3, 0, 3, 0]] * 2
    assert len({f["references"][0]["digest"] for f in found}) == 1
    assert [f["reference_cache"] for f in found] == ["miss", "memory", "memory", "memory"]


def test_signed_urls(served: Served) -> None:
    first, second = (served.draw()["result"]["sample"] for _ in range(2))
    assert httpx.get(first).status_code == 200

    def changed(url: str, **query: Any) -> int:
        parts = urlsplit(url)
        values = dict(parse_qsl(parts.query)) | {name: str(value) for name, value in query.items()}
        answer = httpx.get(parts._replace(query=urlencode(values)).geturl())
        if answer.status_code != 200:
            types(answer)
        return answer.status_code

    expires = int(dict(parse_qsl(urlsplit(first).query))["expires"])
    assert changed(first, expires=expires) == 200
    assert changed(first, expires=expires + 1) == 403
    assert changed(first, expires=1) == 403
    assert changed(first, expires="x") == 422
    assert changed(first, signature="0" * 64) == 403
    assert changed(first, signature="") == 403
    assert changed(first, signature="é") == 403
    assert changed(first, signature=dict(parse_qsl(urlsplit(second).query))["signature"]) == 403
    assert httpx.get(first.replace("/1.jpg", "/2.jpg")).status_code == 403
    assert httpx.get(first.replace("/1.jpg", "/1.png")).status_code == 404
    assert httpx.get(first.replace("/1.jpg", "/..%2f..%2fsecret")).status_code in (403, 404)
    assert httpx.get(first.partition("?")[0]).status_code == 422


def test_what_is_wrong_is_said_in_one_shape(served: Served) -> None:
    picture = text(png())
    cases: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({"prompt": None}, ("body", "prompt")),
        ({"prompt": ""}, ("body", "prompt")),
        ({"prompt": "   "}, ("body", "prompt")),
        ({"prompt": "a" * 32001}, ("body", "prompt")),
        ({"width": 50}, ("body", "width")),
        ({"width": 72}, ("body", "width")),
        ({"width": 16384, "height": 16384}, ("body", "width")),
        ({"width": "64"}, ("body", "width")),
        ({"seed": -1}, ("body", "seed")),
        ({"seed": 1.5}, ("body", "seed")),
        ({"seed": 2**63}, ("body", "seed")),
        ({"safety_tolerance": 7}, ("body", "safety_tolerance")),
        ({"output_format": "gif"}, ("body", "output_format")),
        ({"num_images": 11}, ("body", "num_images")),
        ({"num_inference_steps": 0}, ("body", "num_inference_steps")),
        ({"timeout": 0}, ("body", "timeout")),
        ({"steps": 51}, ("body", "steps")),
        ({"steps": 4, "num_inference_steps": 5}, ("body", "steps")),
        ({"aspect_ratio": "wide"}, ("body", "aspect_ratio")),
        ({"aspect_ratio": "9:1"}, ("body", "aspect_ratio")),
        ({"background": "nocolour"}, ("body", "background")),
        ({"mask": picture}, ("body", "mask")),
        ({"guidence": 3}, ("body", "guidence")),
        ({"input_image": "not base64!"}, ("body", "input_image")),
        ({"input_image_2": text(b"not a picture")}, ("body", "input_image_2")),
        ({"input_image": "https://example.org/a.png"}, ("body", "input_image")),
        ({"input_image": picture, "references": "0" * 64}, ("body", "references")),
        ({"webhook_secret": "s"}, ("body", "webhook_secret")),
        ({"webhook_url": "http://127.0.0.1/"}, ("body", "webhook_url")),
        ({"webhook_url": "https://example.org/", "webhook_secret": "a\r\nb: c"}, ("body", "webhook_secret")),
    ]
    for body, where in cases:
        answer = served.http.post("/v1/edit", json={"prompt": "a", **SIZE, **body})
        assert answer.status_code == 422, (body, answer.text)
        assert where in types(answer), (body, answer.text)
        assert "not base64!" not in answer.text  # what was sent is not repeated
    answer = served.http.post("/v1/edit", json={"prompt": "a", "references": "0" * 64})
    assert answer.status_code == 404
    types(answer)
    for path, name in (
        ("/v1/flux-2-klein-9b", "width"),
        ("/v1/images/generations", "width"),
        ("/v1/references", "images"),
    ):
        answer = served.http.post(path, json={"prompt": "a", {"width": "widht"}.get(name, "imagse"): 1})
        assert f"is not a field here; did you mean {name}?" in answer.text
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/edit", 405), ("PUT", "/v1/get_result", 405)):
        answer = served.http.request(method, path)
        assert answer.status_code == status
        types(answer)


def test_the_hosted_endpoints_do_not_have_the_additions_of_edit(served: Served) -> None:
    for name in ("num_images", "num_inference_steps", "priority", "timeout"):
        answer = served.http.post("/v1/flux-2-klein-9b", json={"prompt": "a", name: 1})
        assert (answer.status_code, types(answer)) == (422, [("body", name)])


def test_cancelling_frees_the_device_within_a_step(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on, call, steps = threading.Event(), threading.Event(), Engine._drop_stopped, []

    def held(own: Engine, going: Any) -> list[int]:
        steps.append(going.jobs[0].id)
        if len(steps) == 1:
            reached.set()
            assert go_on.wait(60)
        return call(own, going)

    monkeypatch.setattr(Engine, "_drop_stopped", held)
    id_ = served.submit(num_inference_steps=50)["id"]
    assert reached.wait(60)
    threading.Timer(0.05, go_on.set).start()
    answer = served.http.delete(f"/v1/jobs/{id_}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert steps == [id_]  # the step that ran, and no other
    found = served.poll(id_)
    assert (found["status"], found["details"]["type"]) == ("Error", "cancelled")
    assert served.draw()["status"] == "Ready"
    assert served.http.delete(f"/v1/jobs/{id_}").json()["status"] == "cancelled"


def test_cancelling_a_job_that_waits_or_is_on_its_way(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.shut()
    first = served.submit()["id"]
    assert gate.entered.wait(60)
    second = served.submit()["id"]
    assert served.http.delete(f"/v1/jobs/{second}").json()["status"] == "cancelled"
    reading, go_on, picture = threading.Event(), threading.Event(), served.service.jobs.picture

    def slow(report: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return picture(report)

    monkeypatch.setattr(served.service.jobs, "picture", slow)
    third = served.submit(input_image=text(png()))["id"]
    assert reading.wait(60)
    threading.Timer(0.05, go_on.set).start()
    assert served.http.delete(f"/v1/jobs/{third}").json()["status"] == "cancelled"
    gate.open()
    assert served.poll(first)["status"] == "Ready"


def test_keys_limits_and_owners(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LimitPolicy(requests_per_minute=60, burst=5, concurrent=2)
    with Served(pipe, tmp_path / "data", keys=KEYS, limits=limits, max_waiting=2) as served:
        bob = {"x-key": BOB}
        for headers in ({}, {"x-key": "wrong-key-0123456789"}, {"x-key": ANNA, "Authorization": f"Bearer {BOB}"}):
            answer = httpx.post(f"{served.url}/v1/edit", json={"prompt": "a", **SIZE}, headers=headers)
            assert answer.status_code == 403
            assert answer.headers["www-authenticate"] == "Bearer"
            types(answer)
            assert httpx.get(f"{served.url}/v1/jobs", headers=headers).status_code == 403
        gate = Gate(monkeypatch)
        gate.shut()
        ids = [served.submit()["id"]]
        assert gate.entered.wait(60)  # it is drawn, so the next one waits and is not drawn with it
        ids.append(served.submit(headers={"Authorization": f"Bearer {ANNA}"})["id"])
        answer = served.http.post("/v1/edit", json={"prompt": "a", **SIZE})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "2 unfinished jobs" in answer.json()["detail"][0]["msg"]
        # the queue of all: one waits, and there is room for one more
        assert served.http.post("/v1/edit", json={"prompt": "b", **SIZE}, headers=bob).status_code == 200
        answer = served.http.post("/v1/edit", json={"prompt": "c", **SIZE}, headers=bob)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        types(answer)
        unready = served.http.get("/readyz")
        assert (unready.status_code, unready.json()) == (503, {"status": "the queue is full"})
        gate.open()
        assert [served.poll(id_)["status"] for id_ in ids] == ["Ready", "Ready"]
        answers = [served.http.post("/v1/edit", json={"prompt": ""}) for _ in range(8)]
        assert answers[0].status_code == 422
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert "requests a minute" in answers[-1].json()["detail"][0]["msg"]
        # what is hers is not his
        sample = served.poll(ids[0])["result"]["sample"]
        assert served.http.get("/v1/get_result", params={"id": ids[0]}, headers=bob).status_code == 404
        assert served.http.get(f"/v1/jobs/{ids[0]}", headers=bob).status_code == 404
        assert served.http.get(f"/v1/jobs/{ids[0]}/events", headers=bob).status_code == 404
        assert served.http.delete(f"/v1/jobs/{ids[0]}", headers=bob).status_code == 404
        assert ids[0] not in served.http.get("/v1/jobs", headers=bob).text
        assert ids[0] in served.http.get("/v1/jobs").text
        assert httpx.get(sample).status_code == 200
        assert httpx.get(f"{served.url}/metrics").status_code == 403


def test_a_budget_of_images(pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"runner": RunnerSettings(images_per_key=3), "checks": Checks(checks=(Words(),))}
    with Served(pipe, tmp_path / "data", keys=KEYS, **settings) as served:  # type: ignore[arg-type]
        assert served.draw(num_images=2)["status"] == "Ready"
        assert served.draw(prompt="forbidden")["status"] == "Request Moderated"  # costs nothing
        body = {"prompt": "a", **SIZE, "num_images": 2, "input_image": text(png())}
        answer = served.http.post("/v1/edit", json=body)
        assert answer.status_code == 402
        assert types(answer) == [()]
        assert "2 of 3 images" in answer.json()["detail"][0]["msg"]
        assert served.files("inputs") == []
        assert served.draw()["status"] == "Ready"
        answer = served.http.post("/v1/images/generations", json={"prompt": "a", "size": "64x64"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
        assert served.http.post("/v1/edit", json={"prompt": "a", **SIZE}, headers={"x-key": BOB}).status_code == 200


class Receiver(http.server.ThreadingHTTPServer):
    """Answers each POST with the next of `answers`; None: takes its time."""

    def __init__(self, *answers: int | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.heard: list[tuple[dict[str, str], bytes]] = []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Receiver:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def wait(self, num: int) -> None:
        end = time.monotonic() + 60
        while len(self.heard) < num:
            assert time.monotonic() < end, self.heard
            time.sleep(0.02)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        self.server.heard.append(({name.lower(): value for name, value in self.headers.items()}, body))
        if answer is None:
            self.server.released.wait(60)
            answer = 200
        self.send_response(answer)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_webhook_is_signed_and_tried_again(pipe: Pipeline, tmp_path: Path) -> None:
    with Receiver(500, 503) as receiver, Receiver() as stranger:
        runner = RunnerSettings(webhooks=Delivery(first_delay=0.02, factor=1.0))
        policy = OutboundPolicy(allowed=frozenset({Origin.parse(receiver.url)}))
        with Served(pipe, tmp_path / "data", runner=runner, outbound_policy=policy) as served:
            answer = served.submit(
                "/v1/flux-2-klein-9b", webhook_url=f"{receiver.url}/done?x=1", webhook_secret="s3cret é", seed=3
            )
            assert (answer["status"], answer["webhook_url"]) == ("Pending", f"{receiver.url}/done?x=1")
            assert answer["polling_url"].endswith(answer["id"])
            receiver.wait(3)
            assert len({body for _, body in receiver.heard}) == 1
            headers, body = receiver.heard[-1]
            assert verify("s3cret é", body, headers["x-bfl-signature"])
            assert not verify("other", body, headers["x-bfl-signature"])
            # http.server reads headers as Latin-1; the official client compares the text
            assert headers["x-webhook-secret"].encode("latin-1").decode() == "s3cret é"
            told = json.loads(body)
            assert (told["id"], told["status"], told["result"]["seed"]) == (answer["id"], "Ready", 3)
            assert httpx.get(told["result"]["sample"]).status_code == 200
            refused = served.http.post("/v1/edit", json={"prompt": "a", **SIZE, "webhook_url": stranger.url})
            assert (refused.status_code, types(refused)) == (422, [("body", "webhook_url")])
            time.sleep(0.1)
            assert len(receiver.heard) == 3  # delivered: no more
        assert stranger.heard == []


def test_a_webhook_that_was_not_delivered_is_after_a_restart(pipe: Pipeline, tmp_path: Path) -> None:
    with Receiver(500) as receiver:
        policy = OutboundPolicy(allowed=frozenset({Origin.parse(receiver.url)}))
        runner = RunnerSettings(webhooks=Delivery(first_delay=2.0))
        with Served(pipe, tmp_path / "data", runner=runner, outbound_policy=policy) as served:
            id_ = served.submit(webhook_url=receiver.url)["id"]
            receiver.wait(1)
        with Served(pipe, tmp_path / "data", runner=runner, outbound_policy=policy):
            receiver.wait(2)
        assert json.loads(receiver.heard[1][1])["id"] == id_


def test_a_receiver_that_is_slow_holds_up_no_other(pipe: Pipeline, tmp_path: Path) -> None:
    with Receiver(None) as slow, Receiver() as quick:
        policy = OutboundPolicy(allowed=frozenset(Origin.parse(r.url) for r in (slow, quick)))
        with Served(pipe, tmp_path / "data", outbound_policy=policy) as served:
            served.submit(webhook_url=slow.url)
            slow.wait(1)
            served.submit(webhook_url=quick.url)
            quick.wait(1)
            slow.released.set()
