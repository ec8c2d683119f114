"""The page as a person meets it: in headless Chromium, by mouse, keyboard and on a phone."""

from __future__ import annotations

import re
import shutil
import time

import httpx
import pytest

from tests.serving.http.test_page import ByWord
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)
expect = playwright.expect


@pytest.fixture(scope="module")
def engine(base, loras):
    limits = Limits(max_requests=4, page_size=4, cache_tokens=800)
    with Engine(str(base), {name: loras[name] for name in ("plain", "wide")}, ByWord(), limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def url(engine, loras):
    with background_server(engine, adapter_roots=[loras["few"].parent]) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """Opens pages, and fails the test if one of them had an error or was refused something by its policy."""
    contexts, errors = [], []

    def opened(url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [error for error in errors if "status of 40" not in error] == []


@pytest.fixture
def page(open_page, url):
    found = open_page(url)
    expect(found.locator("#state")).to_have_text("ready")
    found.locator("#settings summary").click()
    found.get_by_label("Most tokens").fill("12")
    return found


def ask(page, text, count=1):
    page.get_by_label("Prompt").fill(text)
    page.get_by_label("Prompt").press("Enter")
    expect(page.locator(".chat .note")).to_have_count(count)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def answer_of(url, text, model="base", limit=12, **fields):
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": limit, **fields}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60)
    return response.json()["choices"][0]["message"]["content"]


def shown(page, at=0):
    """Return the text of an answer as it is, white space and all."""
    return page.locator(".turn.assistant").nth(at).evaluate("element => element.textContent")


@pytest.mark.parametrize("model", ["base", "plain"])
def test_chat(model, page, url):
    page.get_by_label("Model").select_option(model)
    ask(page, "Say <b>something</b>.")
    assert page.locator(".turn.user").text_content() == "Say <b>something</b>."
    assert shown(page) == answer_of(url, "Say <b>something</b>.", model)
    expect(page.locator(".note")).to_contain_text(re.compile(rf"^{model} · \d+ tokens · first after \d+ ms"))
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_auto_says_what_the_router_chose_and_why(page, url):
    page.get_by_label("Model").select_option("auto")
    ask(page, "a wide river")
    expect(page.locator(".why summary")).to_have_text("the router chose wide, 0.750 ahead of plain")
    assert page.locator(".why tr").all_text_contents() == ["wide1.000", "plain0.250"]
    assert shown(page) == answer_of(url, "a wide river", "wide")


def test_composition_by_sliders(page, url):
    page.get_by_label("Model").select_option("composition …")
    sliders = page.locator(".sliders input")
    for _ in range(12):
        sliders.nth(0).press("ArrowRight")
    for _ in range(4):
        sliders.nth(1).press("ArrowLeft")
    expect(page.locator(".mix .name")).to_have_text("model plain:0.6+wide:-0.2")
    ask(page, "Say something.")
    assert shown(page) == answer_of(url, "Say something.", "plain:0.6+wide:-0.2")


def test_two_side_by_side(page, url):
    page.get_by_role("button", name="Side by side").press("Enter")
    expect(page.get_by_label("Model")).to_have_count(2)
    page.get_by_label("Model").nth(1).select_option("wide")
    ask(page, "Say something.", count=2)
    assert [shown(page, at) for at in (0, 1)] == [answer_of(url, "Say something.", name) for name in ("base", "wide")]
    page.get_by_role("button", name="Side by side").click()
    expect(page.get_by_label("Model")).to_have_count(1)


def test_adapters_are_loaded_and_unloaded(page, url):
    page.get_by_label("Name").fill("few")
    page.get_by_label("Folder on the server").fill("few")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#told")).to_have_text("few is loaded")
    assert "few" in page.get_by_label("Model").locator("option").all_text_contents()
    page.get_by_label("Name").fill("gone")
    page.get_by_label("Folder on the server").fill("/etc")
    with page.expect_response(lambda response: response.status == 403):
        page.evaluate("""() => document.getElementById("load").requestSubmit()""")
    expect(page.locator("#told")).to_contain_text("outside of the folders")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Unload few").click()
    expect(page.locator("#told")).to_have_text("few is unloaded")
    expect(page.locator("#adapters li")).to_have_count(2)


def test_live_numbers(page, engine):
    expect(page.locator('[data-live="resident"]')).to_have_text(re.compile(r"\d of 2"), timeout=8000)
    expect(page.locator('[data-live="pool"]')).to_contain_text(f"of {engine.scheduler.pool.num_pages} pages")
    assert page.locator("#history polyline").get_attribute("points")


def test_escape_stops(page, engine):
    page.get_by_label("Most tokens").fill("200")
    page.get_by_label("Prompt").fill("Say something.")
    page.get_by_label("Prompt").press("Enter")
    page.wait_for_function("() => document.querySelector('.turn.assistant')?.textContent.length > 3")
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("stopped")
    deadline = time.monotonic() + 10
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not engine.has_work, "the server gives the answer up"


def test_api_key(open_page, engine):
    with background_server(engine, api_keys=["secret"]) as url:
        page = open_page(url)
        dialog = page.get_by_role("dialog")
        for key in ("wrong", "secret"):
            expect(dialog).to_be_visible()
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_label("Key", exact=True).press("Enter")
        expect(page.locator("#state")).to_have_text("ready")
        expect(dialog).to_be_hidden()
        assert "plain" in page.get_by_label("Model").locator("option").all_text_contents()
        assert "secret" not in page.content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(scheme, open_page, url):
    page = open_page(url, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    expect(page.locator("#state")).to_have_text("ready")
    page.get_by_role("button", name="Side by side").tap()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing has to be scrolled sideways"
    expect(page.get_by_label("Prompt")).to_be_in_viewport()
    heights = page.locator("header button, #send, #stop").evaluate_all("all => all.map(e => e.offsetHeight)")
    assert min(heights) >= 36, "large enough for a finger"
    assert contrast(page, "#state") >= 4.5
    assert contrast(page, "#send") >= 4.5


def contrast(page, selector: str) -> float:
    """Return WCAG's contrast ratio of a text against what is behind it."""
    colors = page.locator(selector).evaluate("""element => {
        const styles = [getComputedStyle(element)];
        for (let at = element; at; at = at.parentElement) styles.push(getComputedStyle(at));
        const back = styles.map(s => s.backgroundColor).find(c => c !== "rgba(0, 0, 0, 0)");
        return [styles[0].color, back];
    }""")
    one, other = (_luminance([int(n) for n in re.findall(r"\d+", color)[:3]]) for color in colors)
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def _luminance(rgb: list[int]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
