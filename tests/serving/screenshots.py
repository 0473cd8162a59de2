"""Writes screenshots of the page of `funnel serve`, for docs/serving.md.

    python tests/serving/screenshots.py runs/demo-2,2,2-seed0 runs/demo-6-seed0 --output docs

Writes serve.png (1280 pixels wide, light) and serve_phone.png (390 pixels, dark). With --all, also every other state, width
and theme. Needs the extra test, Chromium, and two runs of text classifiers. The latencies are those of the machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parent.parent.parent
PHONE = 390
COLORS = 200  # of the images for the docs, which makes them smaller
TEXTS = [
    "A gripping, beautifully acted story about two brothers that never takes the easy way out.",
    "Two hours that I will never get back.",
    "Not nearly as bad as the trailer suggests, and at times even funny.",
    "The dialogue is wooden, but the landscapes are gorgeous.",
]


def take_screenshots(browser: Browser, url: str, output: Path, wanted: set[tuple[str, int, str]] | None) -> None:
    """Writes name_width_theme.png for every wanted combination; None: for all."""
    for width in (1280, PHONE):
        for theme in ("light", "dark"):
            names = [name for name in STATES if wanted is None or (name, width, theme) in wanted]
            if not names:
                continue
            viewport = {"width": width, "height": 800}
            scale = 1.5 if width == PHONE else 1
            context = browser.new_context(viewport=viewport, color_scheme=theme, device_scale_factor=scale)
            for name in names:
                page = context.new_page()
                page.goto(url)
                page.locator("#examples button").first.wait_for()
                STATES[name](page)
                page.screenshot(path=output / f"{name}_{width}_{theme}.png", full_page=True)
                cancel = page.get_by_role("button", name="Cancel")
                if cancel.is_visible():  # the next files would wait for this one
                    cancel.click()
                    cancel.wait_for(state="detached")
                page.close()
            context.close()


def empty(page: Page) -> None:
    """Nothing has been predicted."""


def explanation(page: Page) -> None:
    """One text, and a selected position of block 1."""
    page.locator("#examples button").first.click()
    page.locator(".positions").nth(1).focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")


def texts(page: Page) -> None:
    """Several texts."""
    page.locator("#texts").fill("\n".join(TEXTS))
    page.keyboard.press("Control+Enter")
    page.locator(".words").wait_for()


def comparison(page: Page) -> None:
    """Several texts and two models."""
    page.locator("#second-model").select_option(index=1)
    page.locator("#texts").fill("\n".join(TEXTS))
    page.keyboard.press("Control+Enter")
    page.locator(".words").nth(1).wait_for()


def file(page: Page) -> None:
    """A file with predictions, one in progress, and one that failed."""
    page.locator("#file-tab").click()
    upload(page, "reviews.csv", "sentence\n" + "A good film.\n" * 20)
    page.get_by_text("20 predictions", exact=True).wait_for()
    upload(page, "notes.csv", "title,body,author\nA,b,c\n")
    page.get_by_text("failed", exact=True).wait_for()
    upload(page, "many_reviews.csv", "sentence\n" + "A good film that is neither long nor short.\n" * 5000)
    page.get_by_text(re.compile("^[1-9].* of 5,000 rows$")).wait_for()


def upload(page: Page, name: str, content: str) -> None:
    """Predicts a file."""
    page.locator("#file").set_input_files({"name": name, "mimeType": "text/csv", "buffer": content.encode()})
    page.get_by_role("button", name="Predict file").click()


def error(page: Page) -> None:
    """More texts than the server takes."""
    page.locator("#texts").fill("A good film.\n" * 300)
    page.keyboard.press("Control+Enter")


STATES = {function.__name__: function for function in (empty, explanation, texts, comparison, file, error)}
DOCS = {("explanation", 1280, "light"): "serve.png", ("explanation", PHONE, "dark"): "serve_phone.png"}


def main() -> None:
    """Serves the runs and writes the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs=2, help="the second one is for the comparison")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", metavar="FOLDER")
    parser.add_argument("--all", action="store_true", help="every state, width and theme, named after them")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "funnel", "serve", *args.runs, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with server, sync_playwright() as playwright:
        try:
            url = next(found[1] for line in server.stdout if (found := re.search(r"serving on (http://\S+?)[,\s]", line)))
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            take_screenshots(browser, url, args.output, None if args.all else set(DOCS))
            browser.close()
        finally:
            server.terminate()
    if not args.all:
        for (name, width, theme), path in DOCS.items():
            screenshot = args.output / f"{name}_{width}_{theme}.png"
            Image.open(screenshot).convert("RGB").quantize(COLORS).save(args.output / path, optimize=True)
            screenshot.unlink()


if __name__ == "__main__":
    main()
