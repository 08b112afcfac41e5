"""The page at /, used with a keyboard in a headless Chromium that is installed on this machine."""

import re
import shutil

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect, sync_playwright

from llama_jax.tokenizer import load_tokenizer
from tests.scripted_server import DEMO, listening, make_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function that opens the page of a server whose model says what it is told to."""
    tokenizer = load_tokenizer(DEMO)

    class Open:
        def __init__(self, reply, color_scheme="light", **engine):
            self.server = make_server(tokenizer, reply, **engine)
            self.color_scheme = color_scheme

        def __enter__(self):
            self.listening = listening(self.server)
            port = self.listening.__enter__()
            self.page = browser.new_page(color_scheme=self.color_scheme)
            self.errors = []
            self.page.on("pageerror", lambda error: self.errors.append(str(error)))
            self.page.goto(f"http://127.0.0.1:{port}/")
            expect(self.page.locator("#model")).to_have_text("demo")
            return self

        def __exit__(self, *failure):
            self.page.close()
            self.listening.__exit__(*failure)
            assert self.errors == []

        def said(self, kind):
            return [
                re.sub(r"\d+ tokens, .* a second", "", text)
                for text in self.page.locator(f"article.{kind}").all_inner_texts()
            ]

    return Open


def test_a_dialog_goes_on_by_keyboard_alone(open_page):
    prompts = []
    with open_page(lambda prompt: prompts.append(prompt) or f"answer {len(prompts)}") as opened:
        for text in ("first", "second"):
            opened.page.keyboard.type(text)
            opened.page.keyboard.press("Enter")
            opened.page.get_by_text("tokens,").nth(len(prompts) - 1 if prompts else 0).wait_for()
            opened.page.locator("#send").wait_for()
        assert opened.said("user") == ["first", "second"]
        assert [text.strip() for text in opened.said("assistant")] == ["answer 1", "answer 2"]
        assert "first" in prompts[1] and "answer 1" in prompts[1]


def test_escape_stops_an_answer_and_its_request(open_page):
    with open_page(lambda _: "word " * 900, max_seq_len=4096, seconds_a_step=0.02) as opened:
        opened.page.keyboard.type("go")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("word word").wait_for()
        opened.page.keyboard.press("Escape")
        opened.page.get_by_text("stopped").wait_for()
        opened.page.wait_for_timeout(300)
        assert opened.server.engine.aborted and not opened.server.engine.running


def test_settings_reach_the_request(open_page):
    with open_page(lambda _: "yes") as opened:
        seen = []
        make = opened.server.engine.requests
        opened.server.engine.requests = lambda prompts, params, **more: (
            seen.extend(params) or make(prompts, params, **more)
        )
        opened.page.locator("#open-settings").press("Enter")
        opened.page.locator("#temperature").fill("0.25")
        opened.page.locator("#seed").fill("7")
        opened.page.locator("#max_tokens").fill("9")
        opened.page.get_by_role("button", name="Done").press("Enter")
        expect(opened.page.locator("#input")).to_be_focused()  # the dialog tells later that it has closed
        opened.page.keyboard.type("go")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("tokens,").wait_for()
        assert (seen[0].temperature, seen[0].seed, seen[0].max_new_tokens) == (0.25, 7, 9)


def test_text_of_the_model_is_never_markup(open_page):
    with open_page(lambda _: "<img src=x onerror=document.title=1>") as opened:
        opened.page.keyboard.type("go")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("tokens,").wait_for()
        assert opened.page.locator("main img").count() == 0 and opened.page.title() == "llama_jax"


def test_markdown_is_set_and_only_links_to_the_web_are_links(open_page):
    said = "## Head\n- one `x`\n- **two**\n\n```py\na < b\n```\n[web](https://x.org) [no](javascript:alert(1))"
    with open_page(lambda _: said) as opened:
        opened.page.keyboard.type("go")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("tokens,").wait_for()
        answer = opened.page.locator("article.assistant .text")
        assert [answer.locator(tag).all_inner_texts() for tag in ("h3", "li", "strong", "pre", "a")] == [
            ["Head"],
            ["one x", "two"],
            ["two"],
            ["a < b"],
            ["web"],
        ]


def test_an_answer_can_be_asked_for_again(open_page):
    prompts = []
    with open_page(lambda prompt: prompts.append(prompt) or f"answer {len(prompts)}") as opened:
        opened.page.keyboard.type("go")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("answer 1").wait_for()
        opened.page.get_by_role("button", name="Again").press("Enter")
        opened.page.get_by_text("answer 2").wait_for()
        assert prompts[0] == prompts[1] and opened.said("user") == ["go"] and len(opened.said("assistant")) == 1


def test_a_text_is_continued_and_the_mode_stays(open_page):
    prompts = []
    with open_page(lambda prompt: prompts.append(prompt) or "(path):") as opened:
        opened.page.keyboard.press("Alt+s")
        opened.page.locator("#mode").select_option("completion")
        opened.page.get_by_role("button", name="Done").press("Enter")
        expect(opened.page.locator("#input")).to_be_focused()
        opened.page.keyboard.type("def read")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("tokens,").wait_for()
        assert prompts[0].endswith("def read") and "header_id" not in prompts[0]
        assert opened.page.locator("article .text").inner_text() == "def read(path):"
        opened.page.reload()
        assert opened.page.locator("#mode").input_value() == "completion"


def test_an_error_is_shown_and_the_message_can_be_sent_again(open_page):
    with open_page(lambda _: "yes", max_seq_len=32) as opened:
        opened.page.keyboard.type("word " * 40)
        opened.page.keyboard.press("Enter")
        opened.page.get_by_role("alert").wait_for()
        assert "no room" in opened.said("error")[0]
        opened.page.keyboard.type("hi")
        opened.page.keyboard.press("Enter")
        opened.page.get_by_text("tokens,").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("chosen", [False, True])
def test_text_stands_out_from_its_background_in_both_schemes(open_page, scheme, chosen):
    system = {"light": "dark", "dark": "light"}[scheme] if chosen else scheme
    with open_page(lambda _: "yes", color_scheme=system) as opened:
        if chosen:
            opened.page.locator("#theme").select_option(scheme, force=True)
        colors = opened.page.evaluate(
            "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"
        )
        assert contrast(*colors) >= 7.0  # WCAG 2.2, AAA
        assert (luminance(colors[0]) < luminance(colors[1])) == (scheme == "light")


def luminance(color):
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)
