"""The page at /, in headless Chromium, over a server with the bundled model. Each test is a caller of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from tests.support.browser import (
    ANY_SIZE,
    CALLERS,
    PHONE,
    Page,
    add,
    clipped,
    draw,
    expect,
    file,
    flat,
    loaded,
    needs_chromium,
    ready,
    sync_api,
    tab_to,
)
from tests.support.serving import Served
from tests.support.tiny import picture

from limner import Pipeline
from limner.images import read_metadata
from limner.trust.provenance import development_credentials

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service with the bundled model, with a key for each test."""
    folder = tmp_path_factory.mktemp("page")
    signer = development_credentials(folder / "c2pa")
    with Served(
        Pipeline.from_pretrained(reference_policy=ANY_SIZE), folder / "data", keys=CALLERS, signer=signer, drain=1
    ) as served:
        yield served.url


def names(page: Page) -> list[str]:
    """The references from left to right, as file names."""
    return [alt.split(": ")[1] for alt in page.eval_on_selector_all(".thumb img", "(all) => all.map((e) => e.alt)")]


def test_a_newcomer_clicks_an_example_and_sees_it_drawn(open_page) -> None:
    page, _ = open_page()
    expect(page.locator("#examples")).to_be_visible()
    page.get_by_role("button", name="use the background of image 2").click()
    expect(page.locator(".card .picture img:not(.preview)")).to_be_visible()
    expect(page.locator("#examples")).to_be_hidden()
    assert page.eval_on_selector(".card .picture img", "(e) => e.decode().then(() => e.naturalWidth)") == 128
    previews = page.evaluate("[...previews]")
    assert previews
    assert all(source.startswith("data:image/png") for source in previews)
    assert page.locator("#references .note").all_inner_texts() == ["128x128, whole"] * 2
    assert re.search(r"References kept: computed in [\d.]+ s", page.inner_text(".cache"))
    expect(page.locator("#announce")).to_contain_text("1 picture ready")


def test_order_is_what_the_server_gets(open_page) -> None:
    page, _ = open_page()
    colours = {"red.png": (200, 0, 0), "green.png": (0, 200, 0), "blue.png": (0, 0, 200), "grey.png": (90, 90, 90)}
    add(page, *(flat(colour, name) for name, colour in colours.items()))
    expect(page.locator("#references .note").last).to_have_text("64x64, whole")
    page.get_by_role("button", name="Move image 1 to the right").click()
    assert names(page) == ["green.png", "red.png", "blue.png", "grey.png"]
    assert page.evaluate("document.activeElement.ariaLabel") == "Move image 2 to the right"  # the same picture's button
    page.get_by_role("button", name="Remove image 4").click()
    page.locator("#references li").nth(2).drag_to(
        page.locator("#references li").nth(0), target_position={"x": 5, "y": 40}
    )
    assert names(page) == ["blue.png", "green.png", "red.png"]
    draw(page)
    loaded(page, ".thumbs img")
    pixel = """(all) => all.map((image) => {
        const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
        context.drawImage(image, 0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    })"""
    assert page.eval_on_selector_all(".thumbs img", pixel) == [[0, 0, 200], [0, 200, 0], [200, 0, 0]]


def test_what_was_cut_stands_beside_the_picture_and_so_does_what_was_refused(open_page) -> None:
    page, seen = open_page()
    add(
        page,
        file(picture(100, 70), "odd.png"),
        flat((1, 2, 3), "tiny.png", (20, 20)),
        file(picture(80, 64), "good.png"),
    )
    refused = page.locator("#references li.refused")
    expect(refused.locator(".note")).to_contain_text("20x20 is too small; each side has to be at least 64 pixels")
    expect(page.locator("#references .note").first).to_have_text(
        "100x70, cut 2 left, 3 top, 2 right, 3 bottom: used as 96x64"
    )
    assert page.locator(".number").all_inner_texts() == ["image 1", "!", "image 2"]
    page.fill("#prompt", "in the snow")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("tiny.png cannot be used")
    assert seen.count("POST", "/v1/edit") == 0
    refused.get_by_role("button", name="Remove").click()
    expect(page.locator("#size option").first).to_have_text("As image 1 (96x64)")
    draw(page)
    expect(page.locator(".card .warning")).to_contain_text("96x64 is not a size that this model has learned to draw")
    assert "96x64 ·" in page.inner_text(".card .foot")


def test_colour_profiles_and_pictures_that_are_not_there_are_told(open_page) -> None:
    page, _ = open_page()
    buffer = io.BytesIO()
    picture(128, 128).save(buffer, "PNG", icc_profile=b"damaged")
    add(page, {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    expect(page.locator("#references .note")).to_contain_text("128x128, colour profile not used: it cannot be read")
    draw(page, "put the cat on the background of image 2")
    expect(page.locator(".card .warning")).to_contain_text("mentions 'image 2', and 1 reference is given")


def test_the_second_run_finds_the_references_and_says_what_that_saved(open_page) -> None:
    page, seen = open_page()
    add(page, file(picture(128, 128, seed=41), "a.png"), file(picture(128, 128, seed=42), "b.png"))
    draw(page, "the first")
    assert "References kept: computed in" in page.locator(".card").first.inner_text()
    draw(page, "the second", variations=2)
    hit = re.compile(r"References found in memory, [\d.]+ s saved")
    assert hit.search(page.locator(".card").first.inner_text())
    assert seen.count("POST", "/v1/references") == 1
    with page.expect_response("**/v1/references"):  # b alone is another set
        page.get_by_role("button", name="Remove image 1").click()
    page.locator(".card").last.get_by_role("button", name="Use references").click()
    expect(page.locator("#references li")).to_have_count(2)
    expect(page.locator("#references .note").last).to_have_text("128x128, whole")
    draw(page, "the third")
    assert hit.search(page.locator(".card").first.inner_text())
    assert seen.count("POST", "/v1/references") == 2  # the pair was not sent again
    page.reload()
    ready(page)
    assert ["computed" in text for text in page.locator(".cache").all_inner_texts()] == [False, False, True]


def test_a_run_is_cancelled(open_page) -> None:
    page, _ = open_page()
    draw(page, "for long", steps=50, variations=8, wait=False)
    expect(page.locator(".card .progress")).to_contain_text(re.compile(r"Step \d+ of 50"))
    assert 0 < page.eval_on_selector("progress", "(e) => e.value") < 1
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".card")).to_have_class("card cancelled")
    expect(page.locator(".card")).to_contain_text("Cancelled.")


def test_runs_and_the_form_survive_a_reload(open_page) -> None:
    page, seen = open_page()
    add(page, file(picture(70, 64, seed=5), "kept.png"))
    expect(page.locator("#references .note")).to_have_text("70x64, cut 3 left, 3 right: used as 64x64")
    draw(page, "done before")
    draw(page, "still running", steps=50, variations=4, wait=False)
    expect(page.locator(".card .progress")).to_contain_text("Step")
    page.reload()
    ready(page)
    assert page.locator(".card h3").all_inner_texts() == ["still running", "done before"]
    assert page.input_value("#prompt") == "still running"
    assert names(page) == ["kept.png"]
    assert page.inner_text("#references .note") == "70x64, cut 3 left, 3 right: used as 64x64"
    expect(page.locator(".card").first.locator("img.preview")).to_have_count(4)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".card").first).to_have_class("card cancelled")
    loaded(page, ".card.ready .picture img")
    assert seen.count("POST", "/v1/references") == 1  # the handle was kept, nothing was sent again


def test_what_is_compared_is_what_was_chosen_last(open_page) -> None:
    """A picture that comes late is not shown under the name of another, nor one of before in place of one that does not."""
    page, _ = open_page()
    add(page, flat((255, 0, 0), "red.png"))
    draw(page, variations=2)
    held: list[sync_api.Route] = []
    page.route("**/v1/jobs/*/references/1.png", lambda route: held.append(route))
    page.reload()
    ready(page)
    page.locator("button.picture").first.click()
    job = page.locator(".card").get_attribute("data-id")
    shown = "(e) => e.decode().then(() => e.src, () => 'none')"
    assert page.input_value("#compare-a") == f"{job}/reference/1"
    page.select_option("#compare-a", f"{job}/2")
    second = page.locator(".card .picture img").nth(1).evaluate("(e) => e.src")
    page.wait_for_function("(src) => document.querySelector('#picture-a').src === src", arg=second)
    assert held
    held.pop().continue_()
    page.wait_for_function("() => document.querySelector('.thumbs img').naturalWidth")
    assert page.locator("#picture-a").evaluate(shown) == second
    page.unroute("**/v1/jobs/*/references/1.png")
    page.route("**/v1/jobs/*/references/1.png", lambda route: route.abort())
    page.reload()
    ready(page)
    page.locator("button.picture").first.click()
    page.select_option("#compare-a", f"{job}/2")
    page.wait_for_function("(src) => document.querySelector('#picture-a').src === src", arg=second)
    page.select_option("#compare-a", f"{job}/reference/1")
    expect(page.locator("#announce")).to_contain_text("reference, image 1 cannot be shown: The server does not answer.")
    assert page.locator("#picture-a").evaluate(shown) == "none"
    assert page.locator("#picture-a").get_attribute("alt").endswith(", which cannot be shown")


def test_two_pictures_are_compared_by_keyboard(open_page) -> None:
    page, _ = open_page()
    add(page, flat((255, 0, 0), "red.png"))
    draw(page)
    page.locator("button.picture").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#compare")).to_be_visible()
    labels = "(e) => e.selectedOptions[0].label"
    assert page.eval_on_selector("#compare-a", labels) == "reference, image 1"
    assert page.eval_on_selector("#compare-b", labels).startswith("result, seed ")
    loaded(page, "#stage img")

    def redness_at(share: float) -> bool:
        box = page.locator("#stage").bounding_box()
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        return shot.getpixel((int(box["x"] + share * box["width"]), int(box["y"] + 0.2 * box["height"]))) == (255, 0, 0)

    assert redness_at(0.3)
    assert not redness_at(0.6)
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    assert page.input_value("#divide") == "20"
    assert not redness_at(0.3)
    assert redness_at(0.15)
    box = page.locator("#stage").bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    assert redness_at(0.7)
    page.get_by_label("Side by side").check(force=True)
    left, right = (page.locator(f"#picture-{side}").bounding_box() for side in "ab")
    assert left["x"] + left["width"] <= right["x"]
    page.keyboard.press("Escape")
    expect(page.locator("#compare")).to_be_hidden()
    assert page.evaluate("document.activeElement.className") == "picture"


def test_a_download_is_the_file_of_the_server(open_page, server: str, tmp_path: Path) -> None:
    page, _ = open_page()
    add(page, file(picture(64, 64, seed=9), "x.png"))
    draw(page, "put the sticker in the snow")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Save picture 1").click()
    seed = page.inner_text(".seed").removeprefix("seed ")
    assert waiting.value.suggested_filename == f"put-the-sticker-in-the-snow-{seed}.png"
    waiting.value.save_as(tmp_path / "out.png")
    data = (tmp_path / "out.png").read_bytes()
    with urlopen(server + page.get_by_role("link", name="Save picture 1").get_attribute("href")) as answer:
        assert data == answer.read()
    told = read_metadata(data)
    assert (told["prompt"], str(told["seed"])) == ("put the sticker in the snow", seed)
    assert b"c2pa" in data
    page.get_by_role("button", name=f"Use seed {seed}").click()
    assert page.input_value("#seed") == seed
    page.get_by_role("button", name="As reference").click()
    expect(page.locator("#references .note")).to_have_text(["64x64, whole"] * 2)


def overflow(page: Page) -> float:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_it_offers_the_sizes_that_the_model_draws(open_page) -> None:
    """Those of the model, and for a model that draws any, shapes with the pixels of its default size."""
    page, _ = open_page()
    sizes: list[list[int]] = []

    def answer(route: sync_api.Route) -> None:
        real = route.fetch()
        assert real.json()["sizes"] == [[128, 128], [160, 96], [96, 160]]
        route.fulfill(response=real, json={**real.json(), "sizes": sizes})

    page.route("**/v1/capabilities", answer)
    for told, values in (([[128, 128], [192, 64]], ["128x128", "192x64"]), ([], ["128x128", "160x96", "96x160"])):
        sizes = told
        page.reload()
        ready(page)
        assert page.eval_on_selector_all("#size option", "(all) => all.map((e) => e.value)") == ["", *values, "custom"]


def test_it_fits_a_phone(open_page) -> None:
    page, _ = open_page(**PHONE)
    assert overflow(page) == 0
    assert clipped(page) == []
    add(
        page,
        file(picture(100, 70), "a" * 80 + ".png"),
        flat((1, 2, 3), "tiny.png", (20, 20)),
        file(picture(80, 64), "b.png"),
    )
    expect(page.locator(".refused .note")).to_contain_text("too small")
    page.fill("#prompt", "a prompt")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("tiny.png cannot be used")
    assert clipped(page) == []
    page.get_by_role("button", name="Remove tiny.png").tap()
    page.select_option("#size", "custom")
    page.fill("#width", "64")
    page.fill("#height", "64")
    page.locator(".more").evaluate("(e) => { e.open = true; }")
    draw(page, "a" * 200, variations=3)
    page.locator("#earlier").evaluate("(e) => { e.open = true; }")
    assert overflow(page) == 0
    assert clipped(page) == []
    assert (
        page.evaluate(
            "Math.max(...[...document.querySelectorAll('main *')].map((e) => e.getBoundingClientRect().right))"
        )
        <= 360
    )
    page.locator("button.picture").first.tap()
    expect(page.locator("#compare")).to_be_visible()
    assert clipped(page) == []
    box = page.locator("#compare").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    stage = page.locator("#stage").bounding_box()
    page.touchscreen.tap(stage["x"] + 0.25 * stage["width"], stage["y"] + stage["height"] / 2)
    assert 20 <= int(page.input_value("#divide")) <= 30


CONTRAST = """() => {
    const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
    const over = (colours) => {
        context.clearRect(0, 0, 1, 1);
        for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((x) => x / 255).map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const poor = [];
    for (const e of document.querySelectorAll("body *")) {
        const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.matches("input, textarea, select");
        if (!text || !e.checkVisibility({visibilityProperty: true}) || e.disabled || e.closest(".hidden, .skip, script, .number, .divide")) continue;
        const behind = [];
        for (let up = e; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
        const ground = over(behind), colour = over([...behind, getComputedStyle(e).color]);
        const [a, b] = [light(ground), light(colour)].sort((x, y) => y - x);
        if ((a + .05) / (b + .05) < 4.5) poor.push(`${e.tagName}.${e.className} ${colour} on ${ground}`);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch_and_can_be_read(open_page, scheme: str) -> None:
    page, _ = open_page(color_scheme=scheme)

    def brightness() -> float:
        return float(np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))[-40:, :40].mean())

    dark = scheme == "dark"
    assert (brightness() < 60) is dark
    assert page.evaluate(CONTRAST) == []
    page.fill("#prompt", " ")
    page.click("#draw")
    add(page, flat((1, 2, 3), "tiny.png", (20, 20)))
    expect(page.locator(".refused .note")).to_contain_text("too small")
    assert page.evaluate(CONTRAST) == []
    page.get_by_role("button", name="Remove").click()
    draw(page)
    draw(page, "again")
    assert page.evaluate(CONTRAST) == []
    page.select_option("#theme", "light" if dark else "dark")
    assert (brightness() > 200) is dark
    page.reload()
    ready(page)
    assert (brightness() > 200) is dark


def test_from_start_to_result_by_keyboard_alone(open_page, tmp_path: Path) -> None:
    page, _ = open_page(reduced_motion="reduce")

    tab_to(page, "#samples button[title='Add cat']")
    page.keyboard.press("Enter")
    expect(page.locator("#references li")).to_have_count(1)
    tab_to(page, "#prompt")
    page.keyboard.type("put the sticker in the snow")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".card")).to_have_class(re.compile("ready"))
    tab_to(page, "button.picture")
    tab_to(page, "button.seed")
    tab_to(page, "a[download]")
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    waiting.value.save_as(tmp_path / "out.png")
    assert read_metadata(tmp_path / "out.png")["prompt"] == "put the sticker in the snow"
    tab_to(page, "button.reuse")


def test_errors_are_shown_in_the_words_of_the_server(open_page) -> None:
    page, _ = open_page()
    page.click("#draw")
    expect(page.locator("#error")).to_have_text("Say what to draw or to change.")
    page.fill("#prompt", "in the snow")
    page.select_option("#size", "custom")
    page.fill("#width", "100")
    page.fill("#height", "64")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text(re.compile("width.*100.*multiple of 16.*96.*112"))
    assert page.evaluate("document.activeElement.id") == "width"
    assert page.get_attribute("#width", "aria-invalid") == "true"
    page.fill("#width", "64")
    page.fill("#seed", "-3")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("seed: -3 is not a whole number")
    page.fill("#seed", "3")
    page.route("**/v1/edit", lambda route: route.abort())
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("The server does not answer")
    page.unroute("**/v1/edit")
    assert page.locator(".card").count() == 0
    draw(page)
    expect(page.locator("#error")).to_be_hidden()
    assert page.inner_text(".seed") == "seed 3"


def test_a_server_with_keys_asks_once(open_page, callers) -> None:
    page, _ = open_page(key=None)
    expect(page.locator("#key")).to_be_visible()
    page.fill("#key-value", "not a key of this server")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).not_to_be_empty()
    page.fill("#key-value", next(callers))
    page.keyboard.press("Enter")
    ready(page)
    expect(page.locator("#key")).to_be_hidden()
    add(page, file(picture(64, 64, seed=77), "a.png"))
    draw(page)
    loaded(page, ".thumbs img")
    page.reload()
    ready(page)
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator(".card")).to_have_count(1)


def test_files_of_the_page_are_local_and_nothing_may_be_loaded_from_elsewhere(server: str) -> None:
    with urlopen(server) as answer:
        policy, html = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "://" not in re.sub(r"<!--.*?-->", "", html)
    for name in ("page.css", "page.js", "icon.svg", "samples/cat.png"):
        with urlopen(f"{server}/static/{name}") as answer:
            assert answer.status == 200
