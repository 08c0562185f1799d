"""The page in a real browser, with a server whose answers are known."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright", reason="playwright is not installed")

from films import write
from page_server import Behaviour, draw_film, known_answers, moment, page_app, running
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tieredkv.evidence.strip import spread, ticks
from tieredkv.tiny.scene import Scene

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install it, or set CHROMIUM to its path"),
]
CHAIN = "follow the house for 4 ?"
PATIENCE = 5000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module, not of the session: while it is open, no other test can run an event loop."""
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scene, Path]:
    return draw_film(tmp_path_factory.mktemp("drawn"))


@dataclass
class Site:
    """A server, and pages of it that are watched: nothing from elsewhere, nothing in the console."""

    browser: Browser
    address: str
    server: Behaviour
    film: Path
    refusals: bool = False
    """Whether requests may fail: the console then says so."""
    heard: list[str] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)

    def open(self, width: int = 1280, height: int = 800, **options: Any) -> Page:
        page = self.browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.heard.append(str(error)))
        page.on("request", lambda request: self.asked_for.append(request.url))
        page.goto(self.address)
        expect(page.locator("body:not([data-view=loading]), dialog[open]").first).to_be_visible()
        return page

    def open_demo(self, **options: Any) -> Page:
        page = self.open(**options)
        page.get_by_role("button", name="Open the demo film").click()
        expect(page.locator("#job")).to_be_hidden()
        return page

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not (self.refusals and message.text.startswith("Failed to load resource")):
            self.heard.append(message.text)


@pytest.fixture
def site(browser: Browser, drawn: tuple[Scene, Path], tmp_path: Path) -> Iterator[Site]:
    scene, film = drawn
    server = Behaviour(answers=known_answers(scene), files={"file-demo": ("demo.mp4", film)})
    with running(page_app(server, tmp_path)) as address:
        site = Site(browser, address, server, film)
        yield site
        for context in browser.contexts:
            context.close()
    assert site.heard == [], "errors in the console, or what the policy forbids"
    assert [url for url in site.asked_for if not url.startswith((address, "blob:", "data:"))] == []


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Question about the film").fill(question)
    page.keyboard.press("Enter")


def answered(page: Page, text: str) -> None:
    expect(page.locator(".turn").last.locator(".words")).to_have_text(text)


def test_a_first_visit_says_what_this_is_and_offers_the_demo(site: Site):
    page = site.open()
    expect(page.get_by_role("heading", name="Ask about a film, and see where the answer looked")).to_be_visible()
    expect(page.get_by_text("This model is a toy.")).to_be_visible()
    expect(page.get_by_text("Up to 4.3 GB.")).to_be_visible()
    page.get_by_role("button", name="Open the demo film").click()
    example = page.get_by_role("button", name="what colour was the house ?")
    example.click()
    answered(page, "red")
    expect(example).to_be_hidden()


def test_a_real_model_is_not_called_a_toy(site: Site):
    site.server.toy, site.server.files = False, {}
    page = site.open()
    expect(page.get_by_text("Qwen/Qwen3.5-9B")).to_be_visible()
    expect(page.get_by_text("This model is a toy.")).to_be_hidden()
    expect(page.get_by_text("Open the demo film")).to_be_hidden()


def test_a_film_is_uploaded_read_and_asked_about_and_its_moments_lead_back_into_it(site: Site):
    site.server.pause = 0.05
    page = site.open()
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2 * site.film.stat().st_size}
    network = page.context.new_cdp_session(page)
    network.send("Network.emulateNetworkConditions", slow)
    page.locator("#file").set_input_files(site.film)
    job = page.locator("#job")
    expect(job).to_contain_text("Uploading")
    expect(job).to_contain_text("kB of")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()
    network.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    expect(job).to_contain_text("of 768 tokens, about")
    expect(page.get_by_role("progressbar", name="Reading the film")).to_be_visible()
    expect(job).to_be_hidden()
    ask(page, CHAIN)
    expect(page.locator(".answer.streaming")).to_contain_text("b heart")
    answered(page, "b heart g arrow c moon k tree")
    marks = page.get_by_role("toolbar", name="Moments on the timeline").get_by_role("button")
    expect(marks).to_have_count(6)
    expect(page.locator("#moments img")).to_have_count(6)
    expect(page.locator("#say")).to_have_text("Answer: b heart g arrow c moon k tree 6 moments")
    page.get_by_role("button", name="moment 2, 0:47 to 0:49", exact=True).click()
    expect(page.locator("#clock")).to_have_text("0:47 / 1:36")
    assert 47 <= page.locator("video").evaluate("film => film.currentTime") <= 49
    expect(marks.nth(1)).to_have_attribute("aria-current", "true")
    width = page.locator("#moments img").first.evaluate("picture => picture.decode().then(() => picture.naturalWidth)")
    assert width > 0


def test_a_film_dropped_anywhere_is_taken(site: Site):
    page = site.open_demo()
    dropped = page.evaluate_handle(
        """async (url) => {
            const data = new DataTransfer();
            data.items.add(new File([await (await fetch(url)).blob()], "dropped.mp4", { type: "video/mp4" }));
            return data;
        }""",
        f"{site.address}v1/files/file-demo/content",
    )
    page.dispatch_event("#films", "dragover", {"dataTransfer": dropped})
    expect(page.get_by_text("Drop it anywhere")).to_be_visible()
    page.dispatch_event("#films", "drop", {"dataTransfer": dropped})
    expect(page.get_by_role("heading", name="dropped.mp4")).to_be_visible()
    expect(page.get_by_role("navigation", name="Films").get_by_role("button", name="dropped.mp4")).to_be_visible()


def test_a_word_shows_what_it_looked_at(site: Site):
    page = site.open_demo()
    ask(page, CHAIN)
    page.get_by_role("option", name="arrow").click()
    expect(page.get_by_role("heading", name="“arrow” looked at 2 moments")).to_be_visible()
    expect(page.locator("#marks button")).to_have_count(2)
    page.get_by_role("button", name="Whole answer").click()
    expect(page.locator("#marks button")).to_have_count(6)


def test_a_word_of_several_tokens_has_the_moments_of_all(site: Site):
    looks = [moment(1, 2, 0.5), moment(1.5, 3, 0.25), moment(8, 9, 0.1)]
    tokens = [{"text": text, "moments": [look]} for text, look in zip(("A lan", "tern", ","), looks, strict=True)]
    faint = [moment(i, i + 1, 0.04) for i in range(3)]
    site.server.answers["what ?"] = [*tokens, {"text": " was", "moments": faint}, {"text": " lit.", "moments": []}]
    page = site.open_demo()
    ask(page, "what ?")
    page.get_by_role("option", name="lantern,").click()
    expect(page.get_by_role("heading", name="“lantern” looked at 2 moments")).to_be_visible()
    page.get_by_role("option", name="was").click()
    expect(page.get_by_role("heading", name="“was” looked all over the film")).to_be_visible()
    page.get_by_role("option", name="lit.").click()
    expect(page.get_by_role("heading", name="“lit” looked at no moment in particular")).to_be_visible()


def test_everything_can_be_done_with_the_keyboard_alone_and_focus_is_seen(site: Site):
    page = site.open()

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            seen = "e => [e.ariaLabel || e.innerText || e.id, getComputedStyle(e).outlineStyle, e.matches('textarea')]"
            text, outline, boxed = page.locator(":focus").evaluate(seen)
            assert outline != "none" or boxed, f"the focus on {text!r} cannot be seen"
            if name in text:
                return
        raise AssertionError(f"Tab does not reach {name!r}")

    tab_to("Open the demo film")
    page.keyboard.press("Enter")
    tab_to("question")
    page.keyboard.type(CHAIN)
    page.keyboard.press("Enter")
    answered(page, "b heart g arrow c moon k tree")
    page.keyboard.press("Shift+Tab")
    while "word" not in page.locator(":focus").evaluate("element => element.className"):
        page.keyboard.press("Shift+Tab")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    expect(page.get_by_role("heading", name="“g” looked at 2 moments")).to_be_visible()
    expect(page.locator(":focus")).to_have_text("g")
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="The answer looked at 6 moments")).to_be_visible()
    page.locator("#play").focus()
    tab_to("moment 1")  # one tab stop for all marks
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#clock")).to_have_text("0:47 / 1:36")
    tab_to("Position in the film")
    page.keyboard.press("PageUp")
    expect(page.locator("#clock")).to_have_text("0:57 / 1:36")


def test_a_follow_up_sends_the_whole_conversation_with_the_film_in_its_first_message(site: Site):
    page = site.open_demo()
    ask(page, "what colour was the house ?")
    answered(page, "red")
    ask(page, CHAIN)
    answered(page, "b heart g arrow c moon k tree")
    film = {"type": "video_url", "video_url": {"url": "file-demo"}}
    assert site.server.asked[-1]["messages"] == [
        {"role": "user", "content": [film, {"type": "text", "text": "what colour was the house ?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": CHAIN},
    ]
    assert site.server.asked[-1]["tieredkv"] == {"evidence": "tokens", "progress": True}


def test_conversations_are_kept_per_film_and_can_be_cleared(site: Site):
    site.server.files["file-other"] = ("other.mp4", site.film)
    page = site.open_demo()
    ask(page, CHAIN)
    answered(page, "b heart g arrow c moon k tree")
    films = page.get_by_role("navigation", name="Films")
    films.get_by_role("button", name="other.mp4").click()
    expect(page.locator(".turn")).to_have_count(0)
    films.get_by_role("button", name="demo.mp4").click()
    page.reload()
    answered(page, "b heart g arrow c moon k tree")
    expect(page.locator("#marks button")).to_have_count(6)
    page.get_by_role("button", name="Clear", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("heading", name="demo.mp4")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


def test_kept_conversations_stay_within_their_bound(site: Site):
    page = site.open()
    characters, latest = page.evaluate(
        """async () => {
            const { keep } = await import("/page/store.js");
            const turn = { state: "done", question: "x".repeat(9000), answer: "y" };
            for (let i = 0; i < 30; i += 1) keep({ id: `file-${i}`, turns: Array(60).fill(turn) });
            const kept = localStorage.getItem("tieredkv.conversations");
            return [kept.length, "file-29" in JSON.parse(kept).films];
        }"""
    )
    assert characters <= 2_000_000
    assert latest, "the latest conversation is kept"


def test_a_busy_server_is_said_to_be_busy_and_tried_again_when_told_to(site: Site):
    site.refusals = True
    site.server.error, site.server.errors = (429, "queue_full", "32 requests wait already: ask again later.", 1), 1
    page = site.open_demo()
    ask(page, CHAIN)
    notice = page.get_by_role("alert").filter(has_text="The server is busy")
    expect(notice).to_contain_text("32 requests wait already: ask again later. It asks to wait 1 s.")
    page.get_by_role("button", name="Keep trying").click()
    expect(page.get_by_text("Trying again")).to_be_visible()
    answered(page, "b heart g arrow c moon k tree")
    assert len(site.server.asked) == 2


def test_a_server_that_is_gone_is_looked_for_until_it_is_back(site: Site):
    site.refusals = True
    page = site.open_demo()
    page.context.set_offline(True)
    ask(page, CHAIN)
    expect(page.get_by_role("alert").filter(has_text="The server cannot be reached")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="The connection to the server was lost.")).to_be_visible()
    page.context.set_offline(False)
    expect(page.get_by_text("The server is back.")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    answered(page, "b heart g arrow c moon k tree")


def test_a_refusal_is_shown_in_the_servers_words(site: Site):
    site.refusals = True
    site.server.error = (400, "budget", "needs 5.2 GiB of host memory, 3.1 GiB free: lower fps.", None)
    page = site.open_demo()
    ask(page, CHAIN)
    expect(page.get_by_role("alert")).to_contain_text(["The server refused"])
    expect(page.get_by_text("Needs 5.2 GiB of host memory, 3.1 GiB free: lower fps.")).to_be_visible()


def test_an_answer_can_be_stopped(site: Site):
    site.server.pause = 0.1
    page = site.open_demo()
    ask(page, CHAIN)
    expect(page.locator(".answer.streaming")).to_contain_text("b")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".about")).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    end = time.monotonic() + PATIENCE / 1000
    while not site.server.stopped and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert site.server.stopped == 1


def test_a_key_is_asked_for_once_and_lets_the_film_play(site: Site):
    site.refusals, site.server.key = True, "let-me-in"
    page = site.open()
    dialog = page.get_by_role("dialog", name="This server needs a key")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("That key was not accepted.")
    dialog.get_by_label("Key", exact=True).fill("ключ")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("That key was not accepted.")
    dialog.get_by_label("Key", exact=True).fill("let-me-in")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Open the demo film").click()
    expect(page.locator("#clock")).to_have_text("0:00 / 1:36")
    page.reload()
    expect(page.locator("#clock")).to_have_text("0:00 / 1:36")
    expect(dialog).to_be_hidden()
    assert page.evaluate("JSON.stringify({ ...localStorage })").count("let-me-in") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(site: Site, scheme: str):
    site.refusals = True
    page = site.open(360, 740, color_scheme=scheme, has_touch=True)
    sideways = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(sideways)
    page.get_by_role("button", name="Films").click()
    expect(page.get_by_role("navigation", name="Films")).to_be_visible()
    assert not page.evaluate(sideways)
    page.get_by_role("button", name="demo.mp4").click()
    site.server.answers["long ?"] = [{"text": "x" * 200, "moments": [moment(i, i + 1, 0.1) for i in range(12)]}]
    ask(page, "long ?")
    answered(page, "x" * 200)
    assert not page.evaluate(sideways)
    boxes = [mark.bounding_box() for mark in page.locator("#marks button").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 24 for box in boxes)
    site.server.error = (400, "refused", "no" * 300, None)
    ask(page, CHAIN)
    expect(page.get_by_text("The server refused")).to_be_visible()
    assert not page.evaluate(sideways)
    dark = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(22, 23, 26)"
    assert dark == (scheme == "dark")


def test_what_comes_from_elsewhere_is_never_markup(site: Site):
    markup = '<img src="/nothing" onerror="document.title = 1"><b>bold</b>'
    site.server.answers[markup] = [{"text": markup, "moments": [moment(1, 2, 0.5)]}]
    site.server.files["file-demo"] = (markup, site.film)
    page = site.open_demo()
    ask(page, markup)
    answered(page, markup)
    expect(page.locator(".turn h3")).to_have_text(f"You asked: {markup}")
    expect(page.get_by_role("heading", name=markup, exact=True)).to_be_visible()
    assert page.locator("#talk img, #talk b, #side img, #side b").count() == 0


def test_a_film_that_the_browser_cannot_play_is_shown_in_frames(site: Site, tmp_path: Path):
    pictures = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(10)]
    site.server.files["file-old"] = ("old.avi", write(tmp_path / "old.avi", pictures, codec="mpeg4"))
    page = site.open()
    page.get_by_role("button", name="old.avi").click()
    expect(page.get_by_text("This browser cannot play")).to_be_visible()
    expect(page.get_by_role("img", name="Frame at 0:00")).to_be_visible()
    expect(page.get_by_role("button", name="Play")).to_be_hidden()


def test_a_file_that_is_no_film_is_not_said_to_have_frames(site: Site, tmp_path: Path):
    site.refusals, site.server.unreadable = True, True
    page = site.open()
    page.get_by_role("button", name="demo.mp4").click()
    expect(page.locator("#ticks span").first).to_be_visible()
    no_film = tmp_path / "no-film.mp4"
    no_film.write_bytes(b"nothing that can be played")
    page.locator("#file").set_input_files(no_film)
    expect(page.get_by_text("Not a readable video file.")).to_be_visible()
    expect(page.get_by_text("Neither this browser nor the server can show this film.")).to_be_visible()
    expect(page.get_by_text("This browser cannot play")).to_be_hidden()
    expect(page.locator("#ticks span")).to_have_count(0)


def test_the_films_parts_are_landmarks(site: Site):
    page = site.open_demo()
    for role, name in (("navigation", "Films"), ("region", "Film"), ("region", "Conversation"), ("main", None)):
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()


def test_labels_are_placed_and_times_are_written_as_in_the_evidence_pictures(site: Site):
    page = site.open()

    def same(call: str, *arguments: Any) -> Any:
        return page.evaluate(f"async (given) => (await import('/page/text.js')).{call}(...given)", list(arguments))

    places = [3.0, 4.0, 50.0, 200.0, 199.0, 310.0]
    assert same("spread", places, 26, 0, 320) == pytest.approx(spread(places, 26, 0, 320))
    assert same("ticks", 7200, 10) == [time for time, _ in ticks(0, 7200)]
    assert [same("timecode", s) for s in (0, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "1:00:00"]
    assert same("bytes", 4 * 2**30) == "4.3\u00a0GB"


@pytest.fixture
def get(tmp_path: Path) -> Callable[[str], Any]:
    from fastapi.testclient import TestClient

    client = TestClient(page_app(Behaviour(), tmp_path))
    return lambda path: client.get(path)


def test_the_page_is_served_with_a_policy_that_allows_only_itself(get: Callable[[str], Any]):
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        answer = get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy


@pytest.mark.parametrize("name", ["routes.py", "..%2froutes.py", "%2e%2e/routes.py", "nothing.js"])
def test_nothing_but_the_pages_own_files_is_served(get: Callable[[str], Any], name: str):
    assert get(f"/page/{name}").status_code == 404


def test_the_markup_has_no_script_or_style_of_its_own(get: Callable[[str], Any]):
    text = get("/").text
    assert "<style" not in text
    assert "style=" not in text
    assert text.count("<script") == 1
    assert "http" not in json.dumps(text).replace("http-equiv", "")
