"""The choice of LoRAs on the page, in headless Chromium, over the bundled model: what is sent, drawn, kept and told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.browser import (
    ANY_SIZE,
    CALLERS,
    PHONE,
    Opener,
    Page,
    add,
    asked,
    draw,
    drawn,
    expect,
    file,
    needs_chromium,
    new_keys,
    ready,
    result,
    tab_to,
)
from tests.support.lora_files import of_attention
from tests.support.serving import Served
from tests.support.tiny import picture

from limner import Pipeline

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """With "ink-v1.5", which acts with 0.8, and "grain", which acts where a run asks for it."""
    pipe = Pipeline.from_pretrained(reference_policy=ANY_SIZE)
    pipe.load_lora_weights(of_attention(pipe, 1), "ink-v1.5")
    pipe.load_lora_weights(of_attention(pipe, 2), "grain")
    pipe.set_adapters(["ink-v1.5"], [0.8])
    return pipe


@pytest.fixture(scope="module")
def server(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Served(pipe, tmp_path_factory.mktemp("loras") / "data", keys=CALLERS, drain=1) as served:
        yield served.url


def box(page: Page, name: str) -> Any:
    return page.get_by_role("checkbox", name=name)


def slider(page: Page, name: str) -> Any:
    return page.get_by_role("slider", name=f"Strength of {name}")


def number(page: Page, name: str) -> Any:
    return page.get_by_role("spinbutton", name=f"Strength of {name}, as a number")


def state(page: Page) -> list[tuple[bool, str, str]]:
    """Of each LoRA, in order: whether it acts, its slider and its number."""
    return [
        (box(page, name).is_checked(), slider(page, name).input_value(), number(page, name).input_value())
        for name in ("ink-v1.5", "grain")
    ]


USUAL = [(True, "0.8", "0.8"), (False, "1", "1")]


def foot(page: Page, *, card: int = 0) -> str:
    return str(page.locator(".card").nth(card).locator(".foot").inner_text())


def test_a_run_has_the_loras_that_are_ticked(open_page, server: str, pipe: Pipeline) -> None:
    page, _ = open_page()
    expect(page.locator("#loras")).to_be_visible()
    assert page.inner_text("#model-name") == "limner-stickers"  # there is no other to choose
    assert state(page) == USUAL
    expect(slider(page, "grain")).to_be_disabled()
    expect(number(page, "grain")).to_be_disabled()
    bodies = asked(page)
    page.fill("#seed", "3")
    draw(page, "a small fox")
    assert "loras" not in bodies[-1]  # as the server was started: it runs with those who never heard of LoRAs
    assert "ink-v1.5 ×0.8" in foot(page)  # noqa: RUF001
    assert "grain" not in foot(page)
    box(page, "grain").check()
    number(page, "grain").fill("-1.25")
    slider(page, "ink-v1.5").evaluate(
        "(e) => { e.value = 0.35; e.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    assert state(page) == [(True, "0.35", "0.35"), (True, "0", "-1.25")]
    draw(page, "a small fox")
    assert bodies[-1]["loras"] == {"ink-v1.5": 0.35, "grain": -1.25}
    assert {"ink-v1.5 ×0.35", "grain ×-1.25"} <= {part.strip() for part in foot(page).split("·")}  # noqa: RUF001
    size = {name: bodies[-1].get(name) for name in ("width", "height")}
    for card, loras in ((0, bodies[-1]["loras"]), (1, None)):
        out = pipe(
            "a small fox", generator=torch.Generator().manual_seed(3), num_inference_steps=1, loras=loras, **size
        )
        assert np.array_equal(np.asarray(result(page, server, card=card).convert("RGB")), np.asarray(out.images[0]))
    for name in ("ink-v1.5", "grain"):
        box(page, name).uncheck()
    draw(page, "a small fox")
    assert bodies[-1]["loras"] == {}
    assert "no LoRA" in foot(page)


def test_settings_of_a_run_come_back_and_stay_over_a_reload(open_page) -> None:
    page, _ = open_page()
    draw(page, "a small fox")
    box(page, "ink-v1.5").uncheck()
    box(page, "grain").check()
    number(page, "grain").fill("0.4")
    draw(page, "a small fox")
    page.get_by_role("button", name="As the server was started").click()
    assert state(page) == USUAL
    expect(page.get_by_role("button", name="As the server was started")).to_be_hidden()
    assert page.evaluate("document.activeElement.type") == "checkbox"  # the focus is not lost with the button
    page.locator(".card").nth(0).get_by_role("button", name="Use all settings").click()
    expect(box(page, "grain")).to_be_checked()
    own = [(False, "0.8", "0.8"), (True, "0.4", "0.4")]
    assert state(page) == own
    page.wait_for_function("() => JSON.parse(sessionStorage.getItem('limner.draft') ?? '{}').loras?.grain === 0.4")
    page.reload()
    ready(page)
    assert state(page) == own
    bodies = asked(page)
    draw(page, "again")
    assert bodies[-1]["loras"] == {"grain": 0.4}
    page.locator(".card").last.get_by_role("button", name="Use all settings").click()
    expect(box(page, "ink-v1.5")).to_be_checked()
    assert state(page) == USUAL


def test_settings_of_a_run_without_loras_come_back(open_page, pipe: Pipeline) -> None:
    """Drawn while the server set none, which is not what it sets now."""
    page, _ = open_page()
    pipe.set_adapters([])
    try:
        draw(page, "a small fox")
    finally:
        pipe.set_adapters(["ink-v1.5"], [0.8])
    page.reload()
    ready(page)
    assert state(page) == USUAL
    page.locator(".card").get_by_role("button", name="Use all settings").click()
    expect(box(page, "ink-v1.5")).not_to_be_checked()
    bodies = asked(page)
    draw(page, "again")
    assert bodies[-1]["loras"] == {}


def test_references_of_a_run_with_its_own_are_not_sent_again(open_page) -> None:
    """K/V are computed once for each choice; the handle of the pictures is one and the same."""
    page, seen = open_page()
    add(page, file(picture(64, 64, seed=4), "a.png"))
    draw(page, "in the snow")
    box(page, "grain").check()
    draw(page, "in the snow")
    assert "computed in" in foot(page)
    draw(page, "in the snow, again")
    assert "found in memory" in foot(page)
    page.get_by_role("button", name="As the server was started").click()
    draw(page, "in the snow, once more")
    assert "found in memory" in foot(page)
    uploads = seen.count("POST", "/v1/references")
    page.locator(".card").nth(1).get_by_role("button", name="Use all settings").click()
    expect(box(page, "grain")).to_be_checked()
    expect(page.locator("#references li")).to_have_count(1)
    draw(page, "the last one")
    assert seen.count("POST", "/v1/references") == uploads


def test_what_cannot_be_asked_for_is_told_at_its_field(open_page) -> None:
    page, seen = open_page()
    box(page, "grain").check()
    number(page, "grain").fill("")
    page.fill("#prompt", "a small fox")
    page.click("#draw")
    expect(page.locator("#error")).to_have_text("The strength of grain is not a number; give one, or untick it.")
    expect(number(page, "grain")).to_have_attribute("aria-invalid", "true")
    expect(number(page, "grain")).to_be_focused()
    assert seen.count("POST", "/v1/edit") == 0
    number(page, "grain").fill("0.5")
    page.click("#draw")
    drawn(page)
    expect(page.locator("#error")).to_be_hidden()
    expect(number(page, "grain")).not_to_have_attribute("aria-invalid", "true")


def test_a_run_of_before_whose_lora_is_gone(open_page, pipe: Pipeline) -> None:
    """As after another start of the server; what is there is taken over."""
    page, _ = open_page()
    box(page, "grain").check()
    number(page, "grain").fill("0.4")
    draw(page, "a small fox")
    pipe.delete_adapters("grain")
    try:
        page.reload()
        ready(page)
        expect(page.locator("#loras li")).to_have_count(1)
        page.locator(".card").get_by_role("button", name="Use all settings").click()
        expect(page.locator("#error")).to_contain_text("The server has no LoRA grain now")
        assert box(page, "ink-v1.5").is_checked()
    finally:
        pipe.load_lora_weights(of_attention(pipe, 2), "grain")
        pipe.set_adapters(["ink-v1.5"], [0.8])


def test_by_keyboard_alone(open_page) -> None:
    page, _ = open_page()
    bodies = asked(page)
    page.fill("#prompt", "a small fox")
    tab_to(page, "#loras li:nth-child(2) input[type=checkbox]")
    page.keyboard.press("Space")
    tab_to(page, "#loras li:nth-child(2) input[type=range]")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert number(page, "grain").input_value() == "0.85"
    tab_to(page, "#loras li:nth-child(2) input[type=number]")
    page.keyboard.press("ArrowDown")
    assert state(page)[1] == (True, "0.8", "0.8")
    page.keyboard.press("Control+Enter")
    drawn(page)
    assert bodies[-1]["loras"] == {"ink-v1.5": 0.8, "grain": 0.8}


def test_on_a_phone_all_of_it_can_be_pressed(open_page) -> None:
    page, _ = open_page(**PHONE)
    for control in page.locator("#loras li").get_by_role("checkbox").all():
        assert control.locator("xpath=..").bounding_box()["height"] >= 24
    for kind in ("range", "number"):
        for one in page.locator(f"#loras li input[type={kind}]").all():
            size = one.bounding_box()
            assert size["height"] >= 24
            assert size["x"] + size["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_server_without_loras_offers_none(browser: Any, tmp_path: Path) -> None:
    with Served(
        Pipeline.from_pretrained(reference_policy=ANY_SIZE), tmp_path / "data", keys=CALLERS, drain=1
    ) as served:
        opener = Opener(browser, served.url, new_keys())
        page, _ = opener()
        expect(page.locator("#loras")).to_be_hidden()
        bodies = asked(page)
        draw(page, "a small fox")
        assert "loras" not in bodies[-1]
        opener.close()
