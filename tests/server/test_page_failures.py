"""What the page says when something is wrong."""

from typing import Any

import pytest
from fastapi.responses import Response, StreamingResponse

from tests.server.page_browser import Visit, answer_of, ask, browser, expect, needs_browser, stub, visit
from tests.server.page_stub import Stub, chunk, refusal, stream

__all__ = ["browser", "stub", "visit"]  # the fixtures


@needs_browser
def test_a_server_with_keys_asks_for_one(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream("In.") if stub.keys[-1] == "Bearer sesame" else refusal(401, "no")
    open_models, stub.models = stub.models, lambda: refusal(401, "no")
    page = visit()
    expect(page.locator("#banner")).to_contain_text("This server asks for an API key.")
    ask(page, "Hi")
    expect(page.locator(".notice.error")).to_contain_text("This server asks for an API key.")
    stub.models = open_models
    page.get_by_role("button", name="Enter a key").last.click()
    expect(page.locator("#api-key")).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Escape")
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(answer_of(page)).to_have_text("In.")
    assert page.evaluate("JSON.stringify(localStorage)").count("sesame") == 0
    page.click("#open-settings")
    page.check("#remember-key")
    assert page.evaluate("localStorage['gfxlm.key']") == "sesame"
    assert page.evaluate("sessionStorage.length") == 0
    page.uncheck("#remember-key")
    assert page.evaluate("localStorage['gfxlm.key']") is None


def _cut() -> Response:
    async def events() -> Any:
        yield chunk(content="Half an")

    return StreamingResponse(events(), media_type="text/event-stream")


def _broken() -> Response:
    async def events() -> Any:
        yield chunk(content="Half an") + 'data: {"error": {"message": "the engine has stopped"}}\n\n'

    return StreamingResponse(events(), media_type="text/event-stream")


@needs_browser
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: refusal(429, "full", **{"Retry-After": "7"}), "The server is busy. Try again in 7 s."),
        (lambda: refusal(503, "loading"), "It may still be loading the model"),
        (lambda: refusal(500, "out of memory"), "The server failed (500). out of memory"),
        (lambda: refusal(400, "'top_k' has to be at least 0"), "'top_k' has to be at least 0"),
        (lambda: refusal(413, "at most 16 MiB"), "too long for the server. at most 16 MiB"),
        (lambda: Response("<html>", 502), "The server failed (502)."),
        (_cut, "The connection was lost before the answer was complete."),
        (_broken, "the engine has stopped"),
    ],
)
def test_errors_are_words_and_can_be_tried_again(visit: Visit, stub: Stub, answer: Any, words: str) -> None:
    good, stub.answer = stub.answer, lambda body: answer()
    page = visit()
    ask(page, "Hi")
    expect(page.locator("[role=alert].notice")).to_contain_text(words)
    if answer in (_cut, _broken):
        expect(page.locator("article.assistant .markdown").last).to_have_text("Half an")
    page.reload()
    expect(page.locator("[role=alert].notice")).to_contain_text(words)
    stub.answer = good
    page.click(".notice button")
    expect(answer_of(page)).to_have_text("Hello there.")
    assert stub.bodies[-1]["messages"] == [{"role": "user", "content": "Hi"}]


@needs_browser
def test_a_server_that_has_gone(visit: Visit, stub: Stub) -> None:
    page = visit()
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    ask(page, "Hi")
    expect(page.locator(".notice.error")).to_contain_text("The server cannot be reached.")


@needs_browser
def test_a_number_out_of_range_is_not_sent(visit: Visit, stub: Stub) -> None:
    page = visit()
    page.click("#open-settings")
    page.fill("[name=top_p]", "0.5")
    page.fill("[name=top_p]", "7")
    page.click("#close-settings")
    ask(page, "Hi")
    answer_of(page)
    assert stub.bodies[-1]["top_p"] == 0.5


@needs_browser
def test_full_storage_is_said(visit: Visit) -> None:
    page = visit()
    page.evaluate("localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - 5))")
    ask(page, "Hi " * 100)
    expect(answer_of(page)).to_have_text("Hello there.")
    expect(page.locator("#toast")).to_contain_text("storage is full")
