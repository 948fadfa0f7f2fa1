"""The page against the real server, with the built-in model."""

import re
from collections.abc import Callable
from typing import Any

from gfxlm.server.registry import ModelSpec
from tests.server.conftest import LiveServer, serving
from tests.server.page_browser import answer_of, ask, browser, expect, needs_browser

__all__ = ["browser"]  # the fixture


def open_page(browser: Any, server: LiveServer, max_tokens: int) -> Any:
    page = browser.new_context().new_page()
    page.set_default_timeout(30_000)
    page.goto(server.url)
    page.click("#open-settings")
    page.fill("[name=max_tokens]", str(max_tokens))
    page.fill("[name=temperature]", "0")
    page.keyboard.press("Escape")
    return page


@needs_browser
def test_a_model_answers(browser: Any, server: LiveServer) -> None:
    page = open_page(browser, server, 8)
    expect(page.locator("#model")).to_have_value(server.worker.name)
    ask(page, "def fibonacci(n):")
    expect(page.locator(".counts")).to_have_text(
        re.compile(r"^[\d.]+ tokens/s · 8 tokens · prompt \d+"), timeout=30_000
    )
    assert answer_of(page).inner_text()
    expect(page.locator(".notice")).to_have_text("The answer was cut off at the limit of tokens.")
    ask(page, "Again.")
    expect(page.locator(".counts").last).to_have_text(re.compile("tokens/s"), timeout=30_000)
    expect(page.locator(".notice.error")).to_have_count(0)
    page.context.close()


@needs_browser
def test_stopping_frees_the_slot(browser: Any, server: LiveServer) -> None:
    page = open_page(browser, server, 1500)
    ask(page, "def fibonacci(n):")
    expect(page.locator("article.assistant .markdown").last).not_to_be_empty(timeout=30_000)
    assert server.worker.live == 1
    page.keyboard.press("Escape")
    server.wait(lambda: server.worker.live == 0)
    expect(page.locator(".notice")).to_have_text("Stopped.")
    page.context.close()


@needs_browser
def test_a_key_is_asked_for(browser: Any, make_spec: Callable[..., ModelSpec]) -> None:
    with serving([make_spec()], api_keys=("sesame",)) as server:
        page = browser.new_context().new_page()
        page.goto(server.url)
        page.click("#banner button")
        page.keyboard.type("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_value("builtin")
        expect(page.locator("#banner")).to_be_hidden()
        page.context.close()
