"""Makes docs/page-light.png, page-dark.png and page-phone.png: the page of `limner serve` in headless Chromium.

    python docs/page_screenshots.py [--url http://127.0.0.1:8731]

Without --url it serves the bundled model itself, in a folder that it removes. Needs the extra dev and Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).parent
SAMPLES = DOCS.parent / "src" / "limner" / "assets" / "samples"
MAX_BYTES = 150_000
PATIENCE = 120_000


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server that ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "limner", "serve", "--port", str(port), "--data", folder, "--drain", "1"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), urlopen(f"{address}/readyz"):
                    yield address
                    return
                time.sleep(0.2)
            raise SystemExit("the server ended")
        finally:
            process.terminate()
            process.wait()


def opened(browser: Browser, address: str, width: int, height: int, *, mobile: bool = False) -> Page:
    size = {"width": width, "height": height}
    page = browser.new_page(viewport=size, color_scheme="light", is_mobile=mobile, has_touch=mobile)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page


def draw(page: Page, prompt: str, *, variations: int, seed: int) -> None:
    before = page.locator(".card").count()
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.select_option("#variations", str(variations))
    page.click("#draw")
    page.wait_for_function("(n) => document.querySelectorAll('.card.ready').length > n", arg=before)


def stroke(page: Page, *places: tuple[float, float]) -> None:
    """Paint from place to place, in shares of the picture's sides."""
    box = page.locator("#board-picture").bounding_box()
    assert box is not None
    for number, (x, y) in enumerate(places):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=6)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def settled(page: Page) -> None:
    page.evaluate("document.activeElement.blur(), scrollTo(0, 0), document.querySelector('#composer').scrollTo(0, 0)")
    page.wait_for_function(
        "() => [...document.images].every((e) => e.complete || !e.checkVisibility() "
        "|| e.getBoundingClientRect().top > innerHeight)"
    )


def save(page: Page, name: str) -> None:
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    file = DOCS / name
    for colours in (None, 256, 128, 64):
        kept = image.quantize(colours, dither=Image.Dither.NONE) if colours else image
        kept.save(file, optimize=True)
        if file.stat().st_size < MAX_BYTES:
            break
    print(f"{file}: {image.width}x{image.height}, {file.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that is there already; its history is in the pictures")
    url = parser.parse_args().url
    with contextlib.nullcontext(url) if url else served() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = opened(browser, address, 1200, 860)
        page.set_input_files("#files", [SAMPLES / "meadow.png", SAMPLES / "dog.png"])
        draw(page, "put the dog from image 2 into image 1 on the left", variations=1, seed=4)
        draw(page, "put the dog from image 2 into image 1 on the right", variations=3, seed=7)
        settled(page)
        save(page, "page-light.png")
        page.emulate_media(color_scheme="dark")
        page.click("#paint")
        stroke(page, (0.62, 0.55), (0.72, 0.5), (0.8, 0.62), (0.7, 0.7), (0.63, 0.6))
        save(page, "page-dark.png")
        page.close()
        phone = opened(browser, address, 390, 1150, mobile=True)
        phone.set_input_files("#files", [SAMPLES / "meadow.png", SAMPLES / "dog.png"])
        phone.fill("#prompt", "put the dog from image 2 into image 1 on the right")
        phone.wait_for_function("() => document.querySelectorAll('#references .note:not(:empty)').length === 2")
        settled(phone)
        save(phone, "page-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
