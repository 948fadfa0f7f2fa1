"""A browser with the chat page in it: headless Chromium, against scripted answers."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.server.page_stub import Stub, serving, stream

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync"""
__all__ = ["expect"]
PATIENCE = 20_000  # milliseconds, on a machine that has other things to do
expect.set_options(timeout=PATIENCE)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub(answer=lambda body: stream("Hello ", "there."))
    with serving(stub):
        yield stub


@pytest.fixture
def visit(browser: Any, stub: Stub) -> Iterator[Visit]:
    """Opens the page as a new visitor. At the end: no script has failed, and nothing but this server was asked."""
    wrong: list[str] = []
    contexts = []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda line: line.type == "error" and "Failed to load" not in line.text and wrong.append(line.text),
        )
        page.on("request", lambda request: request.url.startswith(stub.url) or wrong.append(request.url))
        page.on(
            "response", lambda answer: answer.status >= 400 and "/v1/" not in answer.url and wrong.append(answer.url)
        )
        page.goto(stub.url)
        until(page, "document.querySelector('#model').value || !document.querySelector('#banner').hidden")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def until(page: Any, expression: str) -> None:
    """Wait for a condition; playwright's own way evaluates strings in the page, which the page's policy forbids."""
    for _ in range(PATIENCE // 10):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"never true: {expression}")


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.keyboard.press("Enter")


def answer_of(page: Any) -> Any:
    """The last answer, once it is complete."""
    expect(page.locator("article").last).to_have_attribute("aria-busy", "false")
    return page.locator("article.assistant .markdown").last
