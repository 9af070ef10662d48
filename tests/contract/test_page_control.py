"""Painting, extending and weighing on the page, in headless Chromium, over the bundled model: what is sent and drawn."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.browser import (
    ANY_SIZE,
    CALLERS,
    PHONE,
    Page,
    add,
    asked,
    clipped,
    draw,
    drawn,
    expect,
    file,
    needs_chromium,
    ready,
    result,
    sync_api,
    tab_to,
)
from tests.support.serving import Served
from tests.support.tiny import picture

import limner
from limner import Pipeline

pytestmark = needs_chromium
SAMPLES = Path(limner.__file__).parent / "assets" / "samples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service with the bundled model, with a key for each test."""
    with Served(
        Pipeline.from_pretrained(reference_policy=ANY_SIZE),
        tmp_path_factory.mktemp("control") / "data",
        keys=CALLERS,
        drain=1,
    ) as served:
        yield served.url


def paper(page: Page, *, x: float, y: float) -> tuple[float, float]:
    """Where a share of the width and height of the picture is on the screen."""
    page.wait_for_selector("#editor[open]")
    box = page.locator("#board-picture").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def stroke(page: Page, *places: tuple[float, float]) -> None:
    """Paint from place to place, by mouse."""
    page.mouse.move(*paper(page, x=places[0][0], y=places[0][1]))
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(*paper(page, x=x, y=y), steps=4)
    page.mouse.up()


def tint(page: Page) -> np.ndarray:
    """What is painted on the board, (height, width) bool."""
    page.wait_for_selector("#editor[open]")
    # the picture is there: a canvas has 300x150 before
    page.wait_for_function(
        "() => { const e = document.querySelector('#board-mask'); return e.width !== 300 || e.height !== 150; }"
    )
    width, height, values = page.eval_on_selector(
        "#board-mask",
        """(e) => {
            const {data} = e.getContext("2d").getImageData(0, 0, e.width, e.height);
            return [e.width, e.height, [...data.filter((_, i) => i % 4 === 3)]];
        }""",
    )
    return np.array(values).reshape(height, width) > 0


def painted(page: Page, *places: tuple[float, float]) -> np.ndarray:
    """Open the editor and paint from place to place; what is painted, (height, width) bool."""
    page.click("#paint")
    stroke(page, *places)
    found = tint(page)
    assert found.any()
    return found


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is painted."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_of(body: dict[str, Any]) -> np.ndarray:
    """The mask of a request, (height, width) uint8."""
    data = base64.b64decode(body["mask"].partition(",")[2])
    image = Image.open(io.BytesIO(data))
    assert image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    return np.asarray(image.convert("L"))


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """A mask widened by so many pixels in rows and columns."""
    wide = np.pad(mask, by)
    return np.lib.stride_tricks.sliding_window_view(wide, (2 * by + 1, 2 * by + 1)).max((2, 3))


def test_a_part_is_painted_and_all_outside_of_it_stays_to_the_pixel(open_page, server: str) -> None:
    """The picture is larger than the model draws, and the mask and the result have its size."""
    page, _ = open_page()
    photo = picture(300, 200, seed=3)
    add(page, file(photo, "photo.png"))
    painted(page, (0.3, 0.3), (0.5, 0.5), (0.5, 0.6))
    expect(page.locator("#editor-state")).to_contain_text("is painted")
    page.click("#editor-done")
    expect(page.locator("#change-state")).to_contain_text(re.compile(r"\d.* % of it is drawn anew"))
    assert page.locator("#references .tint").count() == 1
    assert page.locator("#size").is_disabled()
    bodies = asked(page)
    draw(page, "put the cat in the snow")
    (body,) = bodies
    mask, image = mask_of(body), np.asarray(result(page, server).convert("RGB"))
    assert mask.shape == image.shape[:2] == (200, 300)
    assert mask[100, 150] == 255
    assert mask[:40].max() == mask[:, 200:].max() == 0
    before = np.asarray(photo.convert("RGB"))
    outside = grown(mask, 8) == 0
    assert outside.mean() > 0.5
    assert (image[outside] == before[outside]).all()
    assert (image[mask == 255] != before[mask == 255]).any(1).mean() > 0.9
    assert re.search(r"[\d.]+ % drawn anew", page.inner_text(".card .foot"))
    page.locator("button.hold").dispatch_event("pointerdown", {"button": 0, "pointerId": 1})
    expect(page.locator(".card .was")).to_be_visible()
    assert (
        page.eval_on_selector(".card .was", "(e) => e.decode().then(() => e.naturalWidth)") == 300
    )  # the photo itself
    page.click("#whole")
    draw(page, "put the cat in the snow")
    assert "mask" not in bodies[-1]
    page.locator(".card").last.get_by_role("button", name="Use all settings").click()
    expect(page.locator("#change-state")).to_contain_text("% of it is drawn anew")
    draw(page, "again", steps=1)
    assert (mask_of(bodies[-1]) == mask).all()
    assert "canvas" in bodies[-1]
    assert result(page, server).size == (300, 200)


def test_brush_eraser_rectangle_invert_undo_and_clear(open_page) -> None:
    page, _ = open_page()
    add(page, file(picture(128, 96, seed=4), "a.png"))
    page.click("#paint")
    expect(page.locator("#mask-undo")).to_be_disabled()
    page.locator("#brush").evaluate("(e) => { e.value = 20; e.dispatchEvent(new Event('input')); }")
    stroke(page, (0.25, 0.5), (0.75, 0.5))
    line = tint(page)
    left, top, right, bottom = box_of(line)
    assert abs(left - (32 - 10)) <= 2
    assert abs(right - (96 + 10)) <= 2
    assert abs(top - (48 - 10)) <= 2
    assert abs(bottom - (48 + 10)) <= 2
    page.locator("label:has([value=rectangle])").click()
    stroke(page, (0.0, 0.0), (0.25, 0.25))
    both = tint(page)
    assert both[:23, :31].all()
    assert (both & ~line)[25:].sum() == 0
    assert line[40, 64]  # which the eraser has to take away
    page.click("#erase")
    stroke(page, (0.0, 0.0), (1.0, 0.5))
    assert not tint(page)[:47].any()
    assert tint(page)[50, 64]
    page.click("#erase")
    page.keyboard.press("Control+z")
    assert (tint(page) == both).all()
    page.click("#mask-undo")
    assert (tint(page) == line).all()
    page.click("#mask-redo")
    page.keyboard.press("Control+Shift+z")
    assert not tint(page)[:47].any()
    page.click("#mask-undo")
    page.click("#mask-invert")
    inverted = tint(page)
    assert not inverted[5, 5]
    assert inverted[90, 5]
    page.click("#mask-clear")
    assert not tint(page).any()
    assert page.locator("#mask-clear").is_disabled()
    page.keyboard.press("Control+z")
    assert (tint(page) == inverted).all()
    page.locator("label:has([value=brush])").click()
    page.mouse.move(*paper(page, x=0.5, y=0.1))
    page.mouse.down(button="right")  # erases, whatever the tool
    page.mouse.up(button="right")
    dot = ~tint(page) & inverted
    assert dot[9, 64]
    assert abs(dot[:, :96].sum() - np.pi * 10**2) < 60


def test_escape_gives_up_what_the_mouse_has_begun(open_page) -> None:
    page, _ = open_page()
    add(page, file(picture(128, 96, seed=4), "a.png"))
    before = painted(page, (0.1, 0.1), (0.2, 0.1))
    for tool in ("rectangle", "brush"):
        page.locator(f"label:has([value={tool}])").click()
        page.mouse.move(*paper(page, x=0.4, y=0.4))
        page.mouse.down()
        page.mouse.move(*paper(page, x=0.6, y=0.6), steps=3)
        page.keyboard.press("Escape")
        page.mouse.move(*paper(page, x=0.8, y=0.8), steps=3)
        page.mouse.up()
        assert (tint(page) == before).all(), tool
        expect(page.locator("#editor")).to_be_visible()
        expect(page.locator("#board-rectangle")).to_be_hidden()
    page.click("#mask-undo")
    assert not tint(page).any()  # what was given up is no step
    page.click("#mask-redo")
    page.locator("label:has([value=extend])").click()
    box = page.locator(".handle.at-right:not(.corner)").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=3)
    assert page.input_value("#expand-right") != "0"
    page.keyboard.press("Escape")
    page.mouse.up()
    assert page.input_value("#expand-right") == "0"
    expect(page.locator("#editor")).to_be_visible()
    page.keyboard.press("Escape")  # nothing is begun
    expect(page.locator("#editor")).to_be_hidden()
    expect(page.locator("#change-state")).to_contain_text("is drawn anew")


def test_two_clicks_open_the_editor_once(open_page) -> None:
    """The picture of the second click would come while the first one's is painted on, and take what is painted."""
    page, _ = open_page()
    add(page, file(picture(128, 96, seed=4), "a.png"))
    expect(page.locator("#change")).to_be_visible()
    page.evaluate(
        """() => {
            const read = window.createImageBitmap;
            let calls = 0;
            const late = new Promise((resolve) => { window.goOn = () => resolve(); });
            window.createImageBitmap = async (file) => { if (calls++) await late; return read(file); };
            for (const id of ["paint", "extend", "paint"]) document.getElementById(id).click();
        }"""
    )
    stroke(page, (0.3, 0.3), (0.5, 0.5))
    before = tint(page)
    page.evaluate("() => { window.goOn(); return new Promise((resolve) => setTimeout(resolve, 200)); }")
    assert (tint(page) == before).all()
    expect(page.locator("#editor-state")).to_contain_text("is painted")
    page.click("#editor-done")
    expect(page.locator("#editor")).to_be_hidden()
    expect(page.locator("#change-state")).to_contain_text("is drawn anew")
    expect(page.locator("#error")).to_be_hidden()
    page.click("#extend")
    expect(page.locator("#expand-left")).to_be_visible()


def test_the_frame_is_dragged_and_the_picture_stays_in_it(open_page, server: str) -> None:
    page, _ = open_page()
    photo = picture(128, 128, seed=5)
    add(page, file(photo, "a.png"))
    page.click("#extend")
    page.wait_for_selector("#editor[open]")
    handle, board = (
        page.locator(".handle.at-right:not(.corner)").bounding_box(),
        page.locator("#board-picture").bounding_box(),
    )
    middle = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + board["width"] / 4, middle[1], steps=3)
    page.mouse.up()
    assert page.input_value("#expand-right") == "32"
    expect(page.locator("#expand-size")).to_have_text("128x128 becomes 160x128")
    page.fill("#expand-top", "10")
    page.keyboard.press("Enter")
    page.locator(".handle.at-left:not(.corner)").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert page.locator(".handle.at-left:not(.corner)").get_attribute("aria-valuenow") == "64"
    page.keyboard.press("Home")
    page.fill("#feather", "4")
    page.click("#editor-done")
    expect(page.locator("#change-state")).to_have_text("New area: 10 top, 32 right.")
    bodies = asked(page)
    draw(page, "in the snow")
    (body,) = bodies
    assert (body["expand"], body["mask_blur"]) == ([0, 10, 32, 0], 4)
    image, before = np.asarray(result(page, server).convert("RGB")), np.asarray(photo.convert("RGB"))
    assert image.shape == (138, 160, 3)
    kept = slice(16 + 4, None), slice(None, 128 - 16 - 4)  # an overlap hides the seam, a feather lies beside it
    assert (image[10:, :128][kept] == before[kept]).all()
    assert (image[10:, :128][:10] != before[:10]).any()
    page.locator("button.picture").click()
    box = {side: page.locator(f"#picture-{side}").bounding_box() for side in "ab"}
    assert abs(box["a"]["width"] / box["b"]["width"] - 128 / 160) < 0.01
    assert abs(box["a"]["y"] - box["b"]["y"] - box["b"]["height"] * 10 / 138) < 1


def test_what_the_edit_does_not_change_is_left_alone(open_page, server: str) -> None:
    page, _ = open_page()
    page.set_input_files("#files", [SAMPLES / "cat.png", SAMPLES / "beach.png"])
    expect(page.locator("#references li")).to_have_count(2)
    page.check("#preserve")
    bodies = asked(page)
    draw(page, "put the sticker in the snow", steps=4)
    assert bodies[0]["preserve"] == "auto"
    assert re.search(r"[\d.]+ % left alone", page.inner_text(".card .foot"))
    page.locator("button.picture").click()
    page.select_option("#compare-a", label="what picture 1 changed, in white")
    page.wait_for_function("() => document.querySelector('#picture-a').alt.endsWith('changed, in white')")
    page.wait_for_function("() => document.querySelector('#picture-a').naturalWidth === 128")
    page.keyboard.press("Escape")
    kept, expired = page.evaluate(
        """async () => {
            const {Card} = await import("/static/card.js"), headers = {"x-key": sessionStorage.getItem("limner.key")};
            const {data: [entry]} = await (await fetch("/v1/jobs", {headers})).json();
            const names = (one) => new Card(one, {countsDown: () => false}).pictures().map(({name}) => name);
            return [names(entry), names({...entry, result: {...entry.result, expires: 1}})];
        }"""
    )
    assert set(kept) - set(expired) == {kept[0], "what picture 1 changed, in white"}  # maps are kept as results are
    assert "reference, image 2" in expired
    slider = page.get_by_label("Weight of image 2")
    slider.focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    assert page.locator("#references output").nth(1).inner_text() == "0.6"
    page.uncheck("#preserve")
    page.locator("#strength").evaluate("(e) => { e.value = 50; e.dispatchEvent(new Event('input')); }")
    page.locator(".more").evaluate("(e) => { e.open = true; }")
    page.fill("#likeness", "1.5")
    draw(page, "put the sticker in the snow", steps=4)
    body = bodies[-1]
    assert (body["reference_weights"], body["strength"], body["reference_guidance"]) == ([1, 0.6], 0.5, 1.5)
    assert "preserve" not in body
    assert "strength 50 % · weights 1, 0.6 · likeness 1.5" in page.inner_text(".card .foot")
    page.reload()
    ready(page)
    assert page.input_value("#strength") == "50"
    assert page.locator("#references output").nth(1).inner_text() == "0.6"
    page.locator(".card").last.get_by_role("button", name="Use all settings").click()
    expect(page.locator("#preserve")).to_be_checked()
    expect(page.locator("#strength-value")).to_have_text("100 %")
    expect(page.locator("#references output").nth(1)).to_have_text("1.0")
    assert page.input_value("#likeness") == ""


def test_a_mask_is_painted_by_keyboard_alone(open_page, server: str) -> None:
    page, _ = open_page(reduced_motion="reduce")
    tab_to(page, "#samples button[title='Add cat']")
    page.keyboard.press("Enter")
    expect(page.locator("#references .note")).to_have_text("128x128, whole")
    tab_to(page, "#paint")
    page.keyboard.press("Enter")
    expect(page.locator("#board")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("[")
    size = int(page.input_value("#brush"))
    assert size < 16
    page.keyboard.press("]")
    assert int(page.input_value("#brush")) > size
    before = int(page.input_value("#brush"))
    page.keyboard.press("Space")
    for _ in range(4):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowUp")  # lifted: nothing is painted
    left, top, right, bottom = box_of(tint(page))
    assert abs((right - left) - 5 * before) <= 2
    assert abs((bottom - top) - before) <= 2
    expect(page.locator("#announce")).to_have_text(re.compile(r"\d+, \d+, not painted"))
    page.keyboard.press("r")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Enter")
    assert box_of(tint(page))[1] < top - before
    page.keyboard.press("Control+z")
    assert box_of(tint(page)) == (left, top, right, bottom)
    page.keyboard.press("i")
    page.keyboard.press("i")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")  # gives up the rectangle
    expect(page.locator("#editor")).to_be_visible()
    tab_to(page, "#feather")
    tab_to(page, "[name=mode]:checked")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#expand-left")).to_be_visible()
    tab_to(page, ".handle.at-left")
    page.keyboard.press("ArrowLeft")
    tab_to(page, "[name=mode]:checked")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    expect(page.locator("#editor")).to_be_hidden()
    expect(page.locator("#paint")).to_be_focused()
    expect(page.locator("#change-state")).to_contain_text("is drawn anew")
    tab_to(page, "#preserve, #strength")
    tab_to(page, "#prompt")
    page.keyboard.type("put the cat in the snow")
    page.keyboard.press("Control+Enter")
    drawn(page)
    image = np.asarray(result(page, server).convert("RGB"))
    sample = np.asarray(
        Image.open(io.BytesIO(page.request.get(f"{server}/static/samples/cat.png").body())).convert("RGB")
    )
    changed = (image != sample).any(2)
    assert changed[top + 2 : bottom - 2, left + 2 : right - 2].mean() > 0.5
    assert not changed[: top - 9].any()
    assert not changed[:, : left - 9].any()
    tab_to(page, "button.hold")
    page.keyboard.down("Space")
    expect(page.locator(".card .was")).to_be_visible()
    page.keyboard.up("Space")
    expect(page.locator(".card .was")).to_be_hidden()


class Fingers:
    """Fingers on a page."""

    def __init__(self, page: Page) -> None:
        self._page, self._client = page, page.context.new_cdp_session(page)

    def draw(self, *steps: list[tuple[float, float]]) -> None:
        """Touch, move, rest and leave; each step has the places of all of them.

        A finger that leaves while it moves flings the page, and the next tap stops that in place of being one.
        """
        for number, places in enumerate(steps):
            began = number == 0 or len(places) > len(steps[number - 1])
            self._send("touchStart" if began else "touchMove", places)
        self._page.wait_for_timeout(100)
        self._send("touchMove", steps[-1])
        self._send("touchEnd", [])

    def _send(self, kind: str, places: list[tuple[float, float]]) -> None:
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
        self._client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def tap(page: Page, what: str, until: str) -> None:
    """Tap until something is so: Chromium gives no click for a tap that stops a fling."""
    for _ in range(5):
        page.locator(what).tap()
        with contextlib.suppress(sync_api.TimeoutError):
            page.wait_for_function(f"() => {until}", timeout=2000)  # as a function: the policy forbids eval
            return
    raise AssertionError(f"tapping {what} does not make {until}")


def test_fingers_paint_on_a_phone_and_two_of_them_zoom(open_page, server: str) -> None:
    page, _ = open_page(**PHONE)
    fingers = Fingers(page)
    photo = picture(128, 128, seed=6)
    add(page, file(photo, "a.png"))
    page.locator("#paint").tap()
    edge = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert edge == 0
    at = [paper(page, x=x, y=0.5) for x in (0.3, 0.4, 0.5, 0.6)]
    fingers.draw(*[[place] for place in at])
    left, top, right, bottom = box_of(tint(page))
    painted = tint(page)
    assert abs((left + right) / 2 - 0.45 * 128) <= 3
    width = page.locator("#board-picture").bounding_box()["width"]
    (x, y) = paper(page, x=0.5, y=0.5)
    fingers.draw([(x - 30, y)], [(x - 30, y), (x + 30, y)], [(x - 60, y), (x + 60, y)], [(x - 90, y), (x + 90, y)])
    assert (tint(page) == painted).all()  # the first finger's dot was taken back
    assert page.locator("#board-picture").bounding_box()["width"] > 2.5 * width
    fitted = f"Math.abs(document.querySelector('#board-picture').getBoundingClientRect().width - {width}) < 1"
    tap(page, "#board-fit", fitted)
    tap(page, "label:has([value=extend])", "!document.querySelector('#extend-tools').hidden")
    handle = page.locator(".handle.at-bottom:not(.corner)").bounding_box()
    middle = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    step = page.locator("#board-picture").bounding_box()["width"] / 4
    fingers.draw([middle], [(middle[0], middle[1] + step / 2)], [(middle[0], middle[1] + step)])
    assert page.input_value("#expand-bottom") == "32"
    tap(page, "label:has([value=paint])", "!document.querySelector('#paint-tools').hidden")
    tap(page, "#editor-done", "!document.querySelector('#editor').open")
    expect(page.locator("#change-state")).to_contain_text("is drawn anew")
    draw(page, "in the snow")
    image, before = np.asarray(result(page, server).convert("RGB")), np.asarray(photo.convert("RGB"))
    changed = (image != before).any(2)
    assert changed[top + 2 : bottom - 2, left + 8 : right - 8].mean() > 0.9
    assert not changed[: top - 8].any()
    assert not changed[bottom + 8 :].any()
    tap(page, "button.picture", "document.querySelector('#compare').open")
    stage = page.locator("#stage").bounding_box()
    x, y = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    wide = page.locator("#picture-b").bounding_box()["width"]
    fingers.draw([(x - 20, y), (x + 20, y)], [(x - 60, y), (x + 60, y)])
    assert page.locator("#picture-b").bounding_box()["width"] > 2 * wide


SMALL = """() => [...document.querySelectorAll("button, a[href], input, select, textarea, summary, [role=slider]")]
    .filter((e) => e.checkVisibility({visibilityProperty: true}) && !e.closest(".skip, .hidden"))
    .map((e) => [e, (e.closest("label") ?? e).getBoundingClientRect()])
    .filter(([e, box]) => box.width && Math.min(box.width, box.height) < 24)
    .map(([e, box]) => `${e.tagName} ${e.id} ${e.className} ${e.textContent.slice(0, 20)} ${box.width}x${box.height}`)"""


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_whatever_is_pressed_has_24_pixels_and_its_label_room(open_page, options: dict[str, Any]) -> None:
    page, _ = open_page(**options)
    add(page, file(picture(128, 128, seed=7), "a.png"))
    expect(page.locator("#references .note")).to_have_text("128x128, whole")
    draw(page, "in the snow", variations=2)
    page.locator(".more").evaluate("(e) => { e.open = true; }")
    assert page.evaluate(SMALL) + clipped(page) == []
    page.click("#paint")
    page.wait_for_selector("#editor[open]")
    assert page.evaluate(SMALL) + clipped(page) == []
    page.locator("label:has([value=extend])").click()
    assert page.evaluate(SMALL) + clipped(page) == []
    page.click("#editor-done")
    page.locator("button.picture").first.click()
    assert page.evaluate(SMALL) + clipped(page) == []


def test_a_mask_outlives_a_reload_where_its_picture_does(open_page) -> None:
    page, _ = open_page()
    add(page, file(picture(128, 128, seed=8), "a.png"))
    before = painted(page, (0.3, 0.3), (0.5, 0.5))
    page.click("#editor-done")
    page.wait_for_function("() => JSON.parse(sessionStorage.getItem('limner.draft'))?.part?.mask")
    page.reload()
    ready(page)
    expect(page.locator("#change-state")).to_contain_text("is drawn anew")
    page.click("#paint")
    assert (tint(page) == before).all()


def test_the_last_save_of_a_draft_counts_and_a_slider_saves_when_it_rests(open_page) -> None:
    """The mask of the first save takes long to encode: the second is there before."""
    page, _ = open_page()
    add(page, file(picture(128, 128, seed=8), "a.png"))
    painted(page, (0.3, 0.3), (0.5, 0.5))
    page.click("#editor-done")
    page.wait_for_function("() => JSON.parse(sessionStorage.getItem('limner.draft'))?.part?.mask")
    page.evaluate(
        """() => {
            const encode = HTMLCanvasElement.prototype.toBlob;
            window.encoded = 0;
            HTMLCanvasElement.prototype.toBlob = function (done, kind) {
                const late = window.encoded++ === 0 ? 700 : 0;
                encode.call(this, (blob) => setTimeout(() => { done(blob); window.ended = (window.ended ?? 0) + 1; }, late), kind);
            };
        }"""
    )
    prompt = "(text) => { const e = document.querySelector('#prompt'); e.value = text; e.dispatchEvent(new Event('change', {bubbles: true})); }"
    saved = "JSON.parse(sessionStorage.getItem('limner.draft')).values.prompt"
    page.evaluate(prompt, "first")
    page.wait_for_function("() => window.encoded === 1")
    page.evaluate(prompt, "second")
    page.wait_for_function("() => window.ended === 2")
    page.evaluate("() => new Promise((resolve) => setTimeout(resolve, 50))")
    assert page.evaluate(saved) == "second"
    page.locator("#references .weight input").evaluate(
        """async (e) => {
            window.encoded = 0;
            for (let n = 0; n < 20; n++) {
                e.value = n / 20;
                e.dispatchEvent(new Event("input"));
                await new Promise((resolve) => setTimeout(resolve, 20));
            }
        }"""
    )
    page.wait_for_function("() => JSON.parse(sessionStorage.getItem('limner.draft')).weights[0] === 0.95")
    assert 1 <= page.evaluate("window.encoded") < 10  # each save encodes the mask; a slow machine rests in between
