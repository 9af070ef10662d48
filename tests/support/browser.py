"""The page in headless Chromium: who opens it, what no page may do, and the hands that tests have."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from limner import ReferencePolicy
from limner.server.access.keys import KeyRing

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright (the extra dev)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; apt-get install chromium")

Page, expect = sync_api.Page, sync_api.expect
PATIENCE = 60_000  # ms; a busy machine is not a failure
_KEYS = [f"test-key-of-caller-{i:02}" for i in range(60)]
CALLERS = KeyRing.from_environment(",".join(f"caller-{i}:{key}" for i, key in enumerate(_KEYS)))
"""A key for each test, so that each has a history of its own."""
OBSERVER = """
window.previews = new Set();
new MutationObserver(() => document.querySelectorAll("img.preview").forEach((e) => window.previews.add(e.src)))
  .observe(document, {subtree: true, childList: true, attributes: true, attributeFilter: ["src"]});
"""
_CLIPPED = """() => {
    const pen = document.createElement("canvas").getContext("2d"), found = [];
    const text = (e) => e.selectedOptions ? e.selectedOptions[0]?.text ?? "" : e.placeholder ?? "";
    const tight = (e) => {  // what a select shows, with its arrow; what an empty field suggests
        const style = getComputedStyle(e), arrow = e.selectedOptions ? 16 : 0;
        pen.font = style.font;
        return e.matches("select, input:placeholder-shown")
            && pen.measureText(text(e)).width + arrow > e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    };
    const hides = (p, box) => {
        const over = getComputedStyle(p).overflowX, own = p.getBoundingClientRect();
        return (over === "hidden" || over === "clip") && (box.right > own.right + 1 || box.left < own.left - 1);
    };
    for (const e of document.querySelectorAll("body *")) {
        const says = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || e.matches("select, input");
        if (!says || !e.checkVisibility({visibilityProperty: true, opacityProperty: true}) || e.closest(".hidden, .skip, .wide-table")) continue;
        const box = e.getBoundingClientRect(), parents = [];
        for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) parents.push(p);
        if ((getComputedStyle(e).display !== "inline" && e.scrollWidth > e.clientWidth) || tight(e)
            || box.left < -.5 || box.right > innerWidth + .5 || parents.some((p) => hides(p, box)))
            found.push(`${e.tagName} ${e.id || e.className}: ${(text(e) || e.textContent).slice(0, 40)}`);
    }
    return found;
}"""
ANY_SIZE = ReferencePolicy(sizes=())
"""For the bundled model: small pictures stay small, and are drawn quickly, if not well."""
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser for the tests of a module."""
    expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@dataclass
class Watched:
    """What a page did that no page may do, and what it asked the server for."""

    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def count(self, method: str, path: str) -> int:
        return self.requests.count(f"{method} {path}")


class Opener:
    """Opens the page of a server, each time for a new caller; call `close` to see whether they did what they may not."""

    def __init__(self, browser: Any, url: str, keys: Iterator[str]) -> None:
        self._browser, self._url, self._keys = browser, url, keys
        self._contexts: list[Any] = []
        self._watched: list[Watched] = []

    def __call__(self, *, key: str | None = "", **options: Any) -> tuple[Any, Watched]:
        """A page and what it does. `key` "": that of a new caller; None: none."""
        context = self._browser.new_context(**{"viewport": {"width": 1200, "height": 850}, **options})
        context.set_default_timeout(PATIENCE)
        self._contexts.append(context)
        seen = Watched()
        self._watched.append(seen)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('limner.key', '{key or next(self._keys)}')")
        context.add_init_script(OBSERVER)
        page = context.new_page()

        def asked(request: Any) -> None:
            url = urlsplit(request.url)
            seen.requests.append(f"{request.method} {url.path}")
            if url.scheme not in ("data", "blob") and f"{url.scheme}://{url.netloc}" != self._url:
                seen.problems.append(f"asked {request.url[:200]}")

        context.on("request", asked)
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("console", lambda m: seen.problems.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(self._url)
        if key is not None:
            ready(page)
        return page, seen

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        problems = [problem for seen in self._watched for problem in seen.problems]
        assert not problems, problems


def new_keys() -> Iterator[str]:
    """The keys of callers that have not called."""
    return iter(_KEYS)


def asked(page: Any) -> list[dict[str, Any]]:
    """The bodies of runs that the page asks for from now on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Any) -> None:
        if request.url.endswith("/v1/edit"):
            bodies.append(json.loads(request.post_data))

    page.on("request", note)
    return bodies


def ready(page: Any) -> None:
    page.wait_for_selector("html[data-ready]")


def file(image: Image.Image, name: str) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def flat(colour: tuple[int, int, int], name: str, size: tuple[int, int] = (64, 64)) -> dict[str, object]:
    return file(Image.new("RGB", size, colour), name)


def add(page: Any, *files: dict[str, object]) -> None:
    page.set_input_files("#files", list(files))


def draw(page: Any, prompt: str = "in the snow", *, steps: int = 1, variations: int = 1, wait: bool = True) -> None:
    before = page.locator(".card").count()
    page.fill("#prompt", prompt)
    page.eval_on_selector("#steps", "(e, n) => { e.value = n; }", steps)
    page.select_option("#variations", str(variations))
    page.click("#draw")
    expect(page.locator(".card")).to_have_count(before + 1)
    if wait:
        drawn(page)


def drawn(page: Any) -> None:
    """Wait for the newest run."""
    expect(page.locator(".card").first).to_have_class(re.compile("ready"))


def loaded(page: Any, selector: str) -> None:
    page.wait_for_function(
        "(s) => [...document.querySelectorAll(s)].every((e) => e.complete && e.naturalWidth)", arg=selector
    )


def result(page: Any, url: str, *, card: int = 0, number: int = 1) -> Image.Image:
    """A result as the server gives it."""
    link = page.locator(".card").nth(card).get_by_role("link", name=f"Save picture {number}").get_attribute("href")
    image = Image.open(io.BytesIO(page.request.get(url + link).body()))
    image.load()
    return image


def clipped(page: Any) -> list[str]:
    """The elements whose text has no room: wider than they are, over the screen's side, or under what hides it."""
    return list(page.evaluate(_CLIPPED))


def tab_to(page: Any, what: str, *, most: int = 60) -> None:
    """Press Tab until an element has the focus, and can be seen to have it."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(s) => document.activeElement.matches(s)", what):
            width = page.evaluate(
                """() => {
                    const shown = [document.activeElement, document.activeElement.nextElementSibling, document.activeElement.parentElement];
                    return Math.max(...shown.filter(Boolean).map((e) => getComputedStyle(e))
                        .map((s) => s.outlineStyle === "none" ? 0 : parseFloat(s.outlineWidth)));
                }"""
            )
            assert width >= 1.5, f"the focus on {what} cannot be seen"
            return
    raise AssertionError(f"Tab does not reach {what}")
