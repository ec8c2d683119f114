"""Make the pictures of the web page in docs/images, from a server of the quickstart's adapters.

python tools/page_pictures.py quickstart; needs playwright, and chromium on the path.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from toolkit.serving.serve import background_server, open_engine
from toolkit.serving.spec import ServeSpec
from toolkit.specs import load

OUT = Path(__file__).parent.parent / "docs" / "images"


def main(folder: Path) -> None:
    """Serve what the quickstart left in a folder, and take the pictures."""
    OUT.mkdir(exist_ok=True)
    with (
        open_engine(load(folder / "serve.yaml", ServeSpec)) as engine,
        background_server(engine) as url,
        sync_playwright() as started,
    ):
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        _side_by_side(_open(browser, url, "light", 1280, 800))
        _composition(_open(browser, url, "dark", 1280, 800))
        _phone(_open(browser, url, "light", 390, 844))
        browser.close()


def _open(browser: Browser, url: str, scheme: str, width: int, height: int) -> Page:
    # Playwright's types take the scheme as a literal.
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})  # type: ignore
    page = context.new_page()
    page.goto(url)
    page.wait_for_function("() => document.getElementById('state').textContent === 'ready'")
    return page


def _ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Prompt").press("Enter")
    page.wait_for_function("() => !document.getElementById('send').disabled")


def _side_by_side(page: Page) -> None:
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Model").nth(1).locator("option[value=auto]").wait_for(state="attached")
    page.get_by_label("Model").nth(0).select_option("base")
    page.get_by_label("Model").nth(1).select_option("auto")
    for word in ("calm", "green", "river", "spring pos"):
        page.get_by_role("button", name="New chat").click()
        _ask(page, f'Could you put all of "{word}" in capital letters?')
        page.wait_for_timeout(2500)  # until the live numbers cover the answer
    page.screenshot(path=OUT / "page_side_by_side.png")


def _composition(page: Page) -> None:
    page.get_by_label("Model").select_option("composition …")
    for name, weight in (("upper", "0.6"), ("brackets", "0.4")):
        page.locator(".sliders label", has_text=name).locator("input").fill(weight)
    _ask(page, 'Could you put all of "quiet river" in capital letters?')
    page.wait_for_timeout(4500)
    page.screenshot(path=OUT / "page_composition.png")


def _phone(page: Page) -> None:
    page.get_by_label("Model").select_option("auto")
    _ask(page, 'Could you put every word of "thon book" in square brackets?')
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=OUT / "page_phone.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
