"""The page, read by a real browser: talk, stop, edit, reload, a narrow screen; and what it may load."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

import bitnet_numba as bn
from bitnet_numba.server.page import FOLDER, SCRIPTS
from tests.engine.test_embedding import packed_model
from tests.server.helpers import Running, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
STORY = "Tell me a story about a fox and a lantern."


def test_the_document_needs_nothing_else(server: Running) -> None:
    response = server.client.get("/")
    html, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html") and "default-src 'none'" in policy
    assert "unsafe" not in policy
    without_scripts = re.sub("<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"<script|<link[^>]+stylesheet|@import|url\(|\son[a-z]+=|\sstyle=", without_scripts)
    for kind in ("script", "style"):
        blocks = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        assert len(blocks) == (len(SCRIPTS) if kind == "script" else 1)
        for block in blocks:
            assert base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() in policy


def test_vendored_libraries_have_their_licences() -> None:
    for file in (FOLDER / "vendor").glob("*.js"):
        assert (file.parent / f"{file.name.partition('.')[0]}.LICENSE").stat().st_size > 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or Chrome."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server: Running, browser: Browser) -> Iterator[Page]:
    """The page in a new profile; a mistake of its scripts fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("bitnet-demo")
    yield page
    context.close()
    assert not problems


def say(page: Page, text: str) -> None:
    """Sends a message."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_for_answers(page: Page, count: int) -> list[str]:
    """The answers, once there are so many, and the last is complete."""
    answers = page.locator(".message.assistant")
    expect(answers).to_have_count(count)
    expect(page.locator("#send")).to_be_visible(timeout=20_000)
    return answers.locator(".body").all_inner_texts()


@in_browser
def test_talk(page: Page) -> None:
    page.get_by_role("button", name=STORY).click()
    (story,) = wait_for_answers(page, 1)
    assert "fox" in story.lower() and len(story) > 100
    expect(page.locator(".message.assistant .status")).to_have_text(re.compile(r"[\d.]+ tokens/s · \d+ tokens"))
    expect(page.locator("#context-text")).to_have_text(re.compile(r"[1-9]\d* of 2,048 tokens of context"))
    say(page, "Hello!")
    assert wait_for_answers(page, 2)[0] == story
    page.get_by_role("button", name="Regenerate").click()
    assert wait_for_answers(page, 2)[0] == story


@in_browser
def test_a_conversation_that_is_too_long_goes_on(page: Page) -> None:
    turns = [{"role": role, "content": "fox " * 150} for _ in range(6) for role in ("user", "assistant")]
    page.evaluate("turns => { chat.messages.push(...turns); showAll(); }", turns)
    say(page, STORY)
    wait_for_answers(page, 7)
    expect(page.locator(".message:last-child .status")).to_contain_text(re.compile(r"without the \d+ oldest messages"))


@in_browser
def test_stop_and_edit(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Tell stories.")
    say(page, STORY)
    page.locator(".message.assistant .body > *").first.wait_for()
    page.keyboard.press("Escape")
    (begun,) = wait_for_answers(page, 1)
    assert begun
    expect(page.locator("#context-text")).to_have_text(re.compile(r"^[1-9]\d* of 2,048 tokens of context"))
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("Hello!")
    page.keyboard.press("Enter")
    (answer,) = wait_for_answers(page, 1)
    assert answer and page.locator(".message.user .body").inner_text() == "Hello!"


@in_browser
def test_reload_switch_and_delete(page: Page) -> None:
    say(page, "Hello!")
    answer = wait_for_answers(page, 1)
    page.reload()
    assert wait_for_answers(page, 1) == answer
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    say(page, STORY)
    wait_for_answers(page, 1)
    # The list shows what a chat is about, beyond its first words; a question's buttons stand under its end.
    assert page.locator("#chat-list .open span").first.evaluate("e => e.innerText && e.scrollHeight <= e.clientHeight")
    user = page.locator(".message.user")
    assert page.evaluate(
        "([a, b]) => Math.abs(a.getBoundingClientRect().right - b.getBoundingClientRect().right) < 20",
        [user.locator(".body").element_handle(), user.get_by_role("button", name="Edit").element_handle()],
    )
    page.get_by_role("button", name="Hello!", exact=True).click()
    assert wait_for_answers(page, 1) == answer
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    chats = json.loads(Path(download.value.path()).read_text())["chats"]
    assert [chat["messages"][0]["content"] for chat in chats] == [STORY, "Hello!"]
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    page.reload()
    expect(page.get_by_text("What shall we talk about?")).to_be_visible()
    assert page.locator("#chat-list li").count() == 0


@in_browser
def test_values_of_settings_are_used_or_told(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    told = page.locator("#unused")

    def set_to(label: str, value: str) -> object:
        page.get_by_label(label).fill(value)
        page.get_by_label(label).blur()
        return page.evaluate("name => settings[name]", label.lower().replace(" ", "_"))

    for label, value in (
        ("Temperature", "0.33"),
        ("Top p", "0.955"),
        ("Min p", "0.025"),
        ("Repetition penalty", "1.02"),
    ):
        assert set_to(label, value) == value
        expect(told).to_have_text("")
    assert set_to("Top p", "1.5") == ""
    expect(told).to_have_text(re.compile("^Top p is not used: .+"))
    assert set_to("Top p", "1") == "1"
    expect(told).to_have_text("")


@in_browser
def test_sampling_and_raw_text(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "1")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Maximum tokens").fill("5")
    page.get_by_label("Maximum tokens").blur()
    page.get_by_role("tab", name="Text").click()
    field = page.locator("#text")
    field.fill("Once upon a time")
    texts = []
    for _ in range(2):
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#text-status")).to_have_text(re.compile("5 tokens$"))
        texts.append(field.input_value())
        page.get_by_role("button", name="Undo").click()
        expect(field).to_have_value("Once upon a time")
    assert texts[0] == texts[1] and texts[0].startswith("Once upon a time")


@in_browser
def test_what_an_answer_may_not_do(page: Page) -> None:
    answer = (
        "<img src=x onerror=alert(1)><script>alert(2)</script> ![p](http://x.invalid/y.png)\n\n"
        "[a](javascript:alert(3)) [b](https://example.com) `code`\n\n```\nblock\n```\n<style>*{color:red}</style>"
    )
    events = [
        {"choices": [{"index": 0, "delta": {"content": answer}}]},
        {"choices": [], "usage": {"total_tokens": 9, "completion_tokens": 5}},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    say(page, "Hi")
    wait_for_answers(page, 1)
    shown = page.locator(".message.assistant .body")
    tags = shown.evaluate("body => [...body.querySelectorAll('*')].map(e => e.tagName)")
    assert not {"IMG", "SCRIPT", "STYLE"} & set(tags) and {"CODE", "PRE", "A"} <= set(tags)
    assert "onerror=alert(1)" in shown.inner_text() and len(requests) == 1
    assert shown.evaluate("body => [...body.querySelectorAll('a')].map(a => a.getAttribute('href'))") == [
        None,
        "https://example.com",
    ]


@in_browser
@pytest.mark.parametrize(
    "status, error, text, action",
    [
        (401, {"message": "no", "code": "invalid_api_key"}, "needs an API key", "Enter the key"),
        (429, {"message": "full", "code": "queue_full"}, "busy", "Try again"),
        (400, {"message": "long", "code": "context_length_exceeded"}, "longer than the model's context", "New chat"),
        (400, {"message": "odd value", "code": "invalid_value"}, "odd value", None),
    ],
)
def test_errors_say_what_to_do(page: Page, status: int, error: dict[str, Any], text: str, action: str | None) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, json={"error": error}))
    say(page, "Hello!")
    expect(page.get_by_role("alert")).to_contain_text(text)
    assert page.locator(".message").count() == 1, "the message is kept"
    if action is None:
        assert not page.locator("#banner-action").is_visible()
        return
    page.unroute("**/v1/chat/completions")
    page.locator("#banner-action", has_text=action).click()
    if action == "Enter the key":
        expect(page.get_by_label("API key")).to_be_focused()
    elif action == "Try again":
        wait_for_answers(page, 1)
    else:
        expect(page.locator(".message")).to_have_count(0)


@in_browser
def test_a_narrow_screen(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.reload()
    say(page, STORY)
    wait_for_answers(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("Chats", "Settings"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator(f"#{name.lower()}")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator("#chats")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()


@in_browser
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_an_embedding_model_has_no_chat(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, colours: Literal["light", "dark"]
) -> None:
    """What the server is for, and how to ask: by what the page shows, as it is."""
    packed = packed_model("embedding", tmp_path_factory.mktemp("embedding"))
    load = lambda: bn.load(packed, backend="cpu", threads=1)  # noqa: E731
    with serving(load, models=("it's `an` embedder",), api_keys=("secret",)) as server:
        context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=colours)
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        assert not faults(page)
        page.get_by_role("button", name="Enter the key").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").blur()
        expect(page.get_by_text("This server turns texts into vectors.")).to_be_visible()
        expect(page.locator("#guide")).to_contain_text("a vector of 256 numbers")
        shell, python = page.locator("#guide pre").all_inner_texts()
        for gone in ("#prompt", "#tab-chat", "#show-chats", "#text", "#chats"):
            expect(page.locator(gone)).to_be_hidden()
        expect(page.get_by_label("Temperature")).to_be_hidden()
        assert not faults(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not problems
        context.close()
        environment = {**os.environ, "API_KEY": "secret", "NO_PROXY": "*", "no_proxy": "*"}
        done = subprocess.run(["sh", "-c", shell.replace("curl", "curl -s", 1)], env=environment, capture_output=True)
        vectors = json.loads(done.stdout)["data"]
        assert [len(each["embedding"]) for each in vectors] == [256, 256]
        done = subprocess.run([sys.executable, "-c", python], env=environment, capture_output=True, text=True)
        assert -1 <= float(done.stdout) <= 1, done.stderr


def faults(page: Page) -> list[tuple[str, str]]:
    """What axe finds serious or critical: which rule, and where."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]


@in_browser
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(
    server: Running, browser: Browser, colours: Literal["light", "dark"], width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=colours)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("bitnet-demo")
    assert not faults(page)
    say(page, "Hello!")
    wait_for_answers(page, 1)
    assert not faults(page)
    page.evaluate(
        """content => {
            chat.messages.push({ role: "user", content }, { role: "assistant", thought: "So", content });
            showAll();
        }""",
        "# A\n\n[b](https://c.example) `d`\n\n> e\n\n- f\n\n"
        f"```\n{'g' * 300}\n```\n\n|{'h|' * 100}\n|{'-|' * 100}\n|{'1|' * 100}\n",
    )
    assert not faults(page)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": {"message": "full"}}))
    say(page, "Hello!")
    expect(page.get_by_role("alert")).to_be_visible()
    assert not faults(page)
    page.get_by_role("button", name="Settings", exact=True).click()
    assert not faults(page)
    page.keyboard.press("Escape")
    page.locator(".message.user").last.hover()
    page.get_by_role("button", name="Edit", exact=True).last.click()
    assert not faults(page)
    page.get_by_role("tab", name="Text").click()
    assert not faults(page)
    page.evaluate("""() => { by("text-go").textContent = ""; by("banner-text").style.color = "#977"; }""")
    assert {rule for rule, _ in faults(page)} == {"button-name", "color-contrast"}, "axe has looked"
    context.close()


@in_browser
def test_the_banner_leads_back_to_what_failed(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": {"message": "full"}}))
    say(page, "Hello!")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("button", name="Get an answer")).to_be_in_viewport()
    page.get_by_role("tab", name="Text").click()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("tabpanel")).to_have_attribute("id", "chat-panel")
    wait_for_answers(page, 1)


@in_browser
def test_the_keyboard_reaches_everything_in_order(page: Page) -> None:
    page.locator("body").press("Tab")
    expect(page.get_by_text("Skip to the message field")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Text")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_have_attribute("id", "text-panel")
