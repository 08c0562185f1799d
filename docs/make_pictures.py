"""Take the pictures of the server's page: python docs/make_pictures.py

Starts `tieredkv serve` with the bundled model and asks about its demo film in chromium. Needs the extra `dev` and a
chromium; CHROMIUM is its path where it is not on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).parent / "images"
QUESTIONS = ("what colour was the tree ?", "follow the flag for 4 ?")
PICTURES = (
    ("page.png", 1280, 800, 1.25, "light"),
    ("page-phone.png", 360, 740, 2, "light"),
)
"""Name, size of the window in CSS pixels, device pixels for each, and colours."""


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server with the bundled model."""
    command = [sys.executable, "-m", "tieredkv", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        ready = next((line for line in server.stderr if "ready: " in line), None)
        if ready is None:
            raise SystemExit(f"tieredkv serve ended with {server.wait()}.")
        try:
            yield ready.split("ready: ")[1].strip()
        finally:
            server.terminate()
            server.stderr.read()


def ask(page: Page, address: str) -> None:
    """Leave the page with answers, the moments of the last and their frames, at the first of them."""
    page.goto(address)
    page.get_by_role("button", name="Open the demo film").click()
    expect(page.locator("#job")).to_be_hidden(timeout=60_000)
    for place, question in enumerate(QUESTIONS):
        page.get_by_role("textbox").fill(question)
        page.keyboard.press("Enter")
        page.locator(".turn").nth(place).locator(".words").wait_for()
    for picture in page.locator("#moments img").all():
        picture.evaluate("shown => shown.decode()")
    page.get_by_role("toolbar").get_by_role("button").first.click()
    page.locator("#clock").click()  # away from the button, whose focus would be drawn
    page.wait_for_timeout(500)


def main() -> None:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with serving() as address, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for name, width, height, scale, colours in PICTURES:
            window = {"width": width, "height": height}
            context = browser.new_context(viewport=window, device_scale_factor=scale, color_scheme=colours)
            page = context.new_page()
            ask(page, address)
            page.screenshot(path=IMAGES / name)
            context.close()
            with Image.open(IMAGES / name) as picture:
                picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
            print(f"{name}: {(IMAGES / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
