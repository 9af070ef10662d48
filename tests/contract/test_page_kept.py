"""What the page keeps and tells, in headless Chromium: history, prompts, the model's card, drops, uploads, zoom."""

from __future__ import annotations

import base64
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.browser import (
    ANY_SIZE,
    CALLERS,
    PHONE,
    Page,
    add,
    draw,
    drawn,
    expect,
    file,
    loaded,
    needs_chromium,
    ready,
    result,
    tab_to,
)
from tests.support.serving import Served
from tests.support.tiny import picture

from limner import Pipeline
from limner.engine.about import about_model
from limner.mentions import unknown_words
from limner.options import ModelOptions, ServeOptions
from limner.server.jobs.settings import RunnerSettings

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service that keeps a history, as one on loopback does."""
    folder = tmp_path_factory.mktemp("kept") / "data"
    runner = RunnerSettings.of(ServeOptions(drain=1), is_open=True)
    about = about_model(ModelOptions())
    with Served(
        Pipeline.from_pretrained(reference_policy=ANY_SIZE), folder, keys=CALLERS, drain=1, runner=runner, about=about
    ) as served:
        yield served.url


def test_all_pictures_are_saved_and_runs_are_deleted(open_page, server: str, tmp_path: Path) -> None:
    page, seen = open_page()
    expect(page.locator("#keeping")).to_be_hidden()
    draw(page, "a small fox", variations=4)
    draw(page, "a small fox")
    assert page.inner_text("#kept") == "Pictures are kept on this server, the oldest go when they have more than 2 GiB."
    assert "deleted in" not in page.inner_text("#feed")
    with page.expect_download() as waiting:
        page.click("#save-all")
    assert re.fullmatch(r"limner-\d{4}-\d\d-\d\d\.zip", waiting.value.suggested_filename)
    waiting.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as found:
        assert found.testzip() is None
        names, files = found.namelist(), [found.read(name) for name in found.namelist()]
    assert len(names) == len(set(names)) == 5
    assert all(re.fullmatch(r"a-small-fox-\d+(-\d)?\.png", name) for name in names)
    links = [link.get_attribute("href") for link in page.get_by_role("link", name="Save picture").all()]
    assert sorted(files) == sorted(page.request.get(server + link).body() for link in links)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator(".card").first.get_by_role("button", name="Delete").click()
    expect(page.locator(".card")).to_have_count(1)
    assert page.evaluate("document.activeElement.className") == "card ready"
    assert page.request.get(server + links[0]).status == 404
    assert page.request.get(server + links[1]).status == 200
    page.reload()
    ready(page)
    expect(page.locator(".card")).to_have_count(1)
    page.click("#clear-all")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#welcome")).to_have_attribute("open", "")
    assert page.request.get(server + links[1]).status == 404
    assert seen.count("DELETE", "/v1/jobs") == 1


def test_four_variations_fill_the_row(open_page) -> None:
    page, _ = open_page()
    draw(page, "a small fox", variations=4)
    boxes = [figure.bounding_box() for figure in page.locator(".card figure").all()]
    assert len({box["y"] for box in boxes}) == 1
    row = page.locator(".card .pictures").bounding_box()
    assert abs(boxes[0]["x"] - row["x"]) < 1
    assert abs(boxes[-1]["x"] + boxes[-1]["width"] - row["x"] - row["width"]) < 1


def test_older_runs_are_shown_when_asked_for(open_page) -> None:
    page, _ = open_page()
    draw(page, "a small fox")
    key = page.evaluate("sessionStorage.getItem('limner.key')")
    entry = page.request.get(page.url + "v1/jobs", headers={"x-key": key}).json()["data"][0]
    asked = []

    def answer(route: Any) -> None:
        asked.append(route.request.url.partition("?")[2])
        start, count = (51, 3) if "before" in asked[-1] else (1, 50)
        data = [{**entry, "id": f"job-{n}", "created": 1000 - n} for n in range(start, start + count)]
        route.fulfill(json={"data": data})

    page.route("**/v1/jobs?*", answer)
    page.reload()
    ready(page)
    expect(page.locator(".card")).to_have_count(50)
    page.click("#older")
    expect(page.locator(".card")).to_have_count(53)
    expect(page.locator("#older")).to_be_hidden()
    assert asked == ["limit=50", "limit=50&before=950"]
    assert page.evaluate("document.activeElement.dataset.id") == "job-51"


def test_prompts_of_before_come_back(open_page) -> None:
    page, _ = open_page()
    expect(page.locator("#earlier")).to_be_hidden()
    for prompt in ("a small fox", "a big owl"):
        draw(page, prompt)
    page.fill("#prompt", "being written")
    page.keyboard.press("Alt+ArrowUp")
    assert page.input_value("#prompt") == "a big owl"
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("Alt+ArrowUp")
    assert page.input_value("#prompt") == "a small fox"
    page.keyboard.press("Alt+ArrowDown")
    page.keyboard.press("Alt+ArrowDown")
    assert page.input_value("#prompt") == "being written"
    page.reload()
    ready(page)
    page.locator("#earlier summary").click()
    page.get_by_role("button", name="a small fox", exact=True).click()
    assert page.input_value("#prompt") == "a small fox"
    assert page.evaluate("localStorage.getItem('limner.prompts')") is None  # with a key they are the tab's
    page.locator("#earlier summary").click()
    page.get_by_role("button", name="Forget them").click()
    expect(page.locator("#earlier")).to_be_hidden()
    page.locator("#welcome summary").click()  # they stay
    expect(page.get_by_role("button", name="use the background of image 2")).to_be_visible()


def test_the_card_is_a_click_away_and_words_that_the_model_does_not_know_are_told(open_page) -> None:
    page, _ = open_page()
    assert page.inner_text("#model-name") == "limner-stickers"
    page.fill("#prompt", "put the cat on a spaceship in the snow, please")
    expect(page.locator("#unknown-words")).to_have_text("This model was not trained on “spaceship”.")
    for text, known in (
        ("A Cat, cat2dog", ["cat"]),
        ("Übergröße e\u0301 ²½Ⅳ 猫が cat-cat's", ["cat"]),
        ("16:9 (4x3)", []),
    ):
        ask = """([text, known]) => import("/static/words.js").then((own) => own.unknownWords(text, new Set(known)))"""
        assert page.evaluate(ask, [text, known]) == unknown_words([text], known)
    page.fill("#prompt", "Put the cat in the snow")
    expect(page.locator("#unknown-words")).to_have_text("This model was not trained on “Put” (write “put”).")
    page.get_by_role("button", name="What it can do").last.click()
    expect(page.locator("#card")).to_be_visible()
    expect(page.locator("#card h3").first).to_have_text("The bundled model: stickers on scenes")
    assert (
        page.locator("#card-text table").count()
        == len(re.findall(r"^\|[-|]+\|$", about_model(ModelOptions()).card, re.M))
        > 0
    )
    assert page.locator("#card-text").get_by_text("Does not", exact=True).evaluate("(e) => e.tagName") == "STRONG"
    assert "limner-stickers" in page.inner_text("#card-facts")
    page.keyboard.press("Escape")
    page.fill("#prompt", "put the cat in the snow")
    expect(page.locator("#unknown")).to_be_hidden()
    page.click("#model")
    expect(page.locator("#card")).to_be_visible()


def sheer() -> dict[str, object]:
    image = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (24, 24, 72, 72))
    return file(image, "sheer.png")


def test_a_transparent_picture_gets_a_background_on_the_spot(open_page, server: str) -> None:
    page, seen = open_page()
    add(page, sheer(), file(picture(96, 96, seed=2), "whole.png"))
    refused = page.locator("#references li.refused")
    expect(refused.locator(".note")).to_have_text("It is transparent in places.")
    page.fill("#prompt", "in the snow")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("Choose a background, or remove it.")
    refused.get_by_role("button", name="Black").click()
    expect(refused).to_have_count(0)
    expect(page.locator("#references .note").first).to_have_text("96x96, whole")
    draw(page, "use the spaceship of image 3")
    expect(page.locator(".card .warning")).to_have_text(
        [
            "prompt: mentions 'image 3', and 2 references are given; give image 3, or change the prompt",
            "prompt: the model was not trained on 'spaceship'; its card says what it understands: click the model's name",
            re.compile("^width, height: 96x96 is not a size that this model has learned to draw: 128x128"),
        ]
    )
    loaded(page, ".thumbs img")
    thumb = page.locator(".thumbs img").first
    corner = """(image) => image.decode().then(() => {
        const context = Object.assign(document.createElement("canvas"), {width: 96, height: 96}).getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(2, 2, 1, 1).data];
    })"""
    assert thumb.evaluate(corner) == [0, 0, 0, 255]
    page.get_by_label("Another colour behind image 1").evaluate(
        "(e) => { e.value = '#3366cc'; e.dispatchEvent(new Event('change')); }"
    )
    page.check("#preserve")  # the file itself goes along, and needs it too
    draw(page)
    loaded(page, ".thumbs img")
    assert thumb.evaluate(corner) == [0x33, 0x66, 0xCC, 255]
    assert result(page, server).size == (96, 96)
    assert seen.count("POST", "/v1/references") == 4  # refused, without it, on black, on blue


def test_a_background_goes_with_the_pictures_that_asked_for_it(open_page) -> None:
    page, _ = open_page()
    add(page, sheer())
    page.locator("#references").get_by_role("button", name="Black").click()
    expect(page.locator("#references .note")).to_have_text("96x96, whole")
    add(page, {**sheer(), "name": "unasked.png"})
    expect(page.locator("#references .note").last).to_have_text("96x96, whole")
    page.get_by_role("button", name="Remove image 1").click()
    expect(page.locator("#references .note")).to_have_text("It is transparent in places.")
    page.get_by_role("button", name="Remove").click()
    add(page, {**sheer(), "name": "another.png"})
    expect(page.locator("#references .note")).to_have_text("It is transparent in places.")
    page.locator("#references").get_by_role("button", name="White").click()
    page.check("#preserve")  # the file itself goes along
    draw(page)


DROP = """([kind, text]) => {
    const data = new DataTransfer();
    data.setData(kind, text);
    const event = new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: data});
    document.querySelector("#prompt").dispatchEvent(event);
    return event.defaultPrevented;
}"""


def test_a_drop_from_another_site_says_why_it_is_none_or_is_fetched_by_the_server(open_page) -> None:
    page, seen = open_page()
    html = (
        '<meta charset="utf-8"><a href="https://site.example/page"><img src="https://site.example/a%20cat.png?w=9"></a>'
    )
    assert page.evaluate(DROP, ["text/html", html])
    expect(page.locator("#error")).to_contain_text("gives only the address of a picture of another site")
    expect(page.locator("#error")).to_contain_text("--fetch-urls")
    assert not page.evaluate(DROP, ["text/plain", "only words"])
    assert seen.count("POST", "/v1/references") == 0

    def allow(route: Any) -> None:
        real = route.fetch()
        route.fulfill(response=real, json={**real.json(), "fetch_urls": True})

    named: list[Any] = []

    def fetch(route: Any) -> None:
        if "json" not in route.request.headers["content-type"]:
            route.continue_()
            return
        named.append(json.loads(route.request.post_data))
        data = base64.b64encode(file(picture(96, 64), "a.png")["buffer"]).decode()
        route.continue_(post_data=json.dumps({**named[-1], "images": [data]}))

    page.route("**/v1/capabilities", allow)
    page.route("**/v1/references", fetch)
    page.reload()
    ready(page)
    page.evaluate(DROP, ["text/uri-list", "https://site.example/a%20cat.png?w=9"])
    expect(page.locator("#references .note")).to_have_text("96x64, whole")
    assert named == [{"images": ["https://site.example/a%20cat.png?w=9"], "prefill": False}]
    assert page.locator(".thumb img").get_attribute("alt") == "image 1: a cat.png"


def test_an_upload_tells_how_far_it_is(open_page) -> None:
    page, _ = open_page()
    page.evaluate(
        """() => {
            window.told = [];
            new MutationObserver(() => window.told.push(document.querySelector("#reference-state").textContent))
                .observe(document.querySelector("#reference-state"), {childList: true});
        }"""
    )
    client = page.context.new_cdp_session(page)
    client.send("Network.enable")
    client.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 400_000},
    )
    add(page, file(picture(400, 400), "a.png"))  # half a megabyte
    expect(page.locator("#references .note")).not_to_be_empty()
    told = page.evaluate("window.told")
    assert any(re.fullmatch(r"Sending, \d+ %", text) for text in told), told
    assert told[-1] == ""


def scale(page: Page) -> int:
    return int(page.inner_text("#compare-scale").split()[0])


def test_pictures_are_zoomed_and_moved(open_page) -> None:
    page, _ = open_page()
    draw(page, "a small fox")
    page.locator("button.picture").click()
    assert page.locator("#stage").get_attribute("data-view") == "one"  # there is nothing to compare it with
    fitted = scale(page)
    for _ in range(3):
        page.keyboard.press("+")
    assert scale(page) == pytest.approx(fitted * 1.5**3, abs=2)
    before = page.locator("#picture-b").bounding_box()
    page.keyboard.press("ArrowRight")
    assert page.locator("#picture-b").bounding_box()["x"] == pytest.approx(before["x"] - 40)
    page.keyboard.press("0")
    assert scale(page) == fitted
    stage = page.locator("#stage").bounding_box()
    corner = stage["x"] + 20, stage["y"] + 20
    page.mouse.move(*corner)
    page.mouse.wheel(0, -500)
    page.wait_for_function("(was) => parseInt(document.querySelector('#compare-scale').textContent) > was", arg=fitted)
    box = page.locator("#picture-b").bounding_box()
    assert box["x"] == pytest.approx(
        stage["x"] + 20 - 20 * box["width"] / stage["width"], abs=1
    )  # stays under the pointer
    page.mouse.down()
    page.mouse.move(corner[0] - 50, corner[1] - 30)
    page.mouse.up()
    assert page.locator("#picture-b").bounding_box()["x"] == pytest.approx(box["x"] - 50, abs=1)
    page.click("#compare-exact")
    assert scale(page) >= fitted or scale(page) == 100
    page.click("#compare-fit")
    assert scale(page) == fitted


def test_a_whole_session_by_keyboard(open_page, tmp_path: Path) -> None:
    """From an example to a saved ZIP and an empty page, without a pointer."""
    page, _ = open_page(reduced_motion="reduce")
    page.on("dialog", lambda dialog: dialog.accept())
    tab_to(page, "#model")
    page.keyboard.press("Enter")
    expect(page.locator("#card h3").first).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "model"
    tab_to(page, "#examples button")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(1)
    drawn(page)
    page.keyboard.press("Home")
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#references .weight input")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#references output").first.inner_text() == "0.95"
    tab_to(page, "#extend")
    page.keyboard.press("Enter")
    page.wait_for_selector("#editor[open]")
    tab_to(page, ".handle.at-right")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    expect(page.locator("#extend")).to_be_focused()
    tab_to(page, "#prompt")
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".card")).to_have_count(2)
    drawn(page)
    assert "extended · weights 0.95, 1" in page.locator(".card").first.inner_text()
    tab_to(page, "button.picture", most=80)
    page.keyboard.press("Enter")
    tab_to(page, "#compare-hold")
    page.keyboard.down("Space")
    expect(page.locator("#stage")).to_have_class(re.compile("held"))
    page.keyboard.up("Space")
    expect(page.locator("#stage")).not_to_have_class(re.compile("held"))
    tab_to(page, "#compare-in")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    tab_to(page, "button.delete")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(1)
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#save-all", most=80)
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    waiting.value.save_as(tmp_path / "all.zip")
    assert len(zipfile.ZipFile(tmp_path / "all.zip").namelist()) == 1
    tab_to(page, "#clear-all")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(0)


def test_it_all_fits_a_phone(open_page) -> None:
    page, _ = open_page(**PHONE)
    over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    add(page, sheer())
    expect(page.locator(".refused .note")).to_have_text("It is transparent in places.")
    assert page.evaluate(over) == 0
    page.get_by_role("button", name="White").tap()
    draw(page, "a spaceship and a submarine under a volcano", variations=4)
    assert page.evaluate(over) == 0
    page.locator("#model").tap()
    expect(page.locator("#card h3").first).to_be_visible()
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
