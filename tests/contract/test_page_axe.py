"""The page under axe, the accessibility checker: `make test-clients` installs it in `build/clients` and runs this."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.browser import (
    ANY_SIZE,
    CALLERS,
    PHONE,
    Opener,
    Page,
    add,
    chromium,
    draw,
    expect,
    file,
    needs_chromium,
    new_keys,
)
from tests.support.lora_files import of_attention
from tests.support.serving import Served
from tests.support.tiny import picture

from limner import Pipeline
from limner.engine.about import about_model
from limner.options import ModelOptions

AXE = Path(__file__).parents[2] / "build" / "clients" / "node_modules" / "axe-core" / "axe.min.js"
pytestmark = [
    pytest.mark.clients,
    needs_chromium,
    pytest.mark.skipif(not AXE.exists(), reason="axe is not installed; make test-clients installs it in build/clients"),
]
_callers = new_keys()


@pytest.fixture(scope="module")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    about, pipe = about_model(ModelOptions()), Pipeline.from_pretrained(reference_policy=ANY_SIZE)
    for seed, name in enumerate(("ink", "grain")):
        pipe.load_lora_weights(of_attention(pipe, seed), name)
    folder = tmp_path_factory.mktemp("axe") / "data"
    with Served(pipe, folder, keys=CALLERS, drain=1, about=about) as served, chromium() as browser:
        opener = Opener(browser, served.url, _callers)
        yield opener
        opener.close()


def findings(page: Page) -> list[str]:
    """What axe finds by all of its rules, the recommended ones too."""
    found = page.evaluate(
        "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"
        ".map(({id, help, nodes}) => `${id}: ${help}: ${nodes.map(({html}) => html.slice(0, 120)).join(' | ')}`)"
    )
    return list(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_wherever_a_session_goes(opener: Opener, size: dict[str, Any], scheme: str) -> None:
    page, _ = opener(color_scheme=scheme, reduced_motion="reduce", bypass_csp=True, **size)
    page.add_script_tag(path=AXE)
    assert findings(page) == []
    add(page, file(picture(128, 128, seed=1), "a.png"), file(Image.new("RGBA", (96, 96)), "sheer.png"))
    expect(page.locator(".refused .note")).to_have_text("It is transparent in places.")
    page.fill("#prompt", "a spaceship")
    expect(page.locator("#unknown")).to_be_visible()
    page.click("#draw")
    expect(page.locator("#error")).to_be_visible()
    page.locator(".more").evaluate("(e) => { e.open = true; }")
    assert findings(page) == []
    page.get_by_role("button", name="White").click()
    expect(page.locator("#references li.refused")).to_have_count(0)
    draw(page, "in the snow", steps=50, variations=4, wait=False)
    expect(page.locator(".card .progress")).to_contain_text("Step")
    assert findings(page) == []  # while it draws
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".card")).to_have_class("card cancelled")
    page.click("#paint")
    page.wait_for_selector("#editor[open]")
    board = page.locator("#board").bounding_box()
    page.mouse.move(board["x"] + board["width"] / 2, board["y"] + board["height"] / 2)
    page.mouse.down()
    page.mouse.move(board["x"] + board["width"] / 2 + 40, board["y"] + board["height"] / 2)
    assert findings(page) == []  # while it is painted
    page.mouse.up()
    page.locator("label:has([value=extend])").click()
    assert findings(page) == []
    page.click("#editor-done")
    draw(page, "in the snow", variations=4)
    page.locator("#earlier").evaluate("(e) => { e.open = true; }")
    assert findings(page) == []
    page.locator("button.picture").first.click()
    for view in ("slider", "side", "one"):
        page.locator(f"label:has([value={view}])").click()
        assert findings(page) == []
    page.click("#compare-close")
    page.click("#model")
    expect(page.locator("#card h3").first).to_be_visible()
    assert findings(page) == []
