"""The chat page in a browser: headless Chromium, against scripted answers."""

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from fastapi.testclient import TestClient

from gfxlm.server.page import router
from tests.server.page_browser import Visit, answer_of, ask, browser, expect, needs_browser, stub, until, visit
from tests.server.page_stub import Stub, chunk, stream

__all__ = ["browser", "stub", "visit"]  # the fixtures


def test_files_are_cached_by_what_is_in_them_and_run_nothing_foreign() -> None:
    app = FastAPI()
    app.include_router(router)
    client = TestClient(app)
    first = client.get("/")
    assert first.status_code == 200
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in first.headers["content-security-policy"]
    assert "unsafe" not in first.headers["content-security-policy"]
    assert first.headers["x-content-type-options"] == "nosniff"
    for name in re.findall(r'(?:src|href)="(page/[^"#]+)"', first.text):
        answer = client.get("/" + name)
        assert answer.status_code == 200
        again = client.get("/" + name, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.head("/page/main.js").content == b""
    assert client.get("/page/main.js").headers["etag"] != client.get("/page/api.js").headers["etag"]
    assert "<script>" not in first.text
    assert " on" + "click" not in first.text


def test_every_file_is_in_the_package() -> None:
    folder = Path(__file__).parents[2] / "gfxlm" / "data" / "page"
    scripts = "".join(path.read_text() for path in folder.glob("*.js"))
    imported = set(re.findall(r'from "\./([a-z]+\.js)"', scripts))
    assert imported <= {path.name for path in folder.iterdir()}
    assert "innerHTML" not in scripts


@needs_browser
def test_a_question_is_answered_as_it_streams(visit: Visit, stub: Stub) -> None:
    gate = threading.Event()
    stub.answer = lambda body: stream("First ", "second ", "third.", gate=gate)
    page = visit()
    ask(page, "Say three words")
    shown = "document.querySelector('article.assistant > .markdown')?.textContent.trim()"
    until(page, f"{shown} === 'First second'")  # and not yet the third
    expect(page.locator("#stop")).to_be_visible()
    gate.set()
    expect(answer_of(page)).to_have_text("First second third.")
    expect(page.locator(".counts")).to_have_text("41.2 tokens/s · 3 tokens · prompt 96 (64 cached)")
    expect(page.locator("#status")).to_have_text("First second third.")
    expect(page.locator("#send")).to_be_visible()
    expect(page).to_have_title("Say three words · gfxlm")
    assert stub.bodies == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": "Say three words"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert stub.keys == [None]


@needs_browser
def test_the_conversation_goes_along(visit: Visit, stub: Stub) -> None:
    page = visit()
    ask(page, "One")
    answer_of(page)
    page.select_option("#model", "large")
    ask(page, "Two")
    answer_of(page)
    assert stub.bodies[-1]["model"] == "large"
    assert stub.bodies[-1]["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "Two"},
    ]


@needs_browser
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_keeps_what_came_and_tells_the_server(visit: Visit, stub: Stub, how: str) -> None:
    stub.answer = lambda body: stream("word ", pause=0.02, forever=True, stub=stub)
    page = visit()
    ask(page, "Go on")
    expect(page.locator("article.assistant .markdown").last).to_contain_text("word word")
    page.click("#stop") if how == "button" else page.keyboard.press("Escape")
    expect(answer_of(page)).to_contain_text("word word")
    expect(page.locator(".notice")).to_have_text("Stopped.")
    for _ in range(500):
        if not stub.disconnects:
            page.wait_for_timeout(20)
    assert stub.disconnects == 1


@needs_browser
def test_settings_reach_the_request(visit: Visit, stub: Stub) -> None:
    page = visit()
    page.click("#open-settings")
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 0}
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))
    page.fill("[name=system]", "Be brief.")
    page.select_option("[name=thinking]", "off")
    page.keyboard.press("Escape")
    page.reload()  # they are kept
    until(page, "document.querySelector('#model').value")
    ask(page, "Hi")
    answer_of(page)
    assert {name: stub.bodies[-1][name] for name in values} == values
    assert stub.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert stub.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#open-settings")
    page.click("button[type=reset]")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    answer_of(page)
    assert set(stub.bodies[-1]) == {"model", "messages", "stream", "stream_options"}


@needs_browser
def test_light_and_dark(visit: Visit) -> None:
    def is_dark(page: Any) -> bool:
        red = page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
        return int(red) < 100

    assert not is_dark(visit(color_scheme="light"))
    page = visit(color_scheme="dark")
    assert is_dark(page)
    page.click("#theme")
    assert not is_dark(page)
    page.reload()
    assert not is_dark(page)
    page.click("#theme")
    page.emulate_media(color_scheme="light")  # back at the system's own, it follows the system
    assert not is_dark(page)


# The name of what has the focus, and whether one sees that it has: by an outline, or in the composer by its border.
_FOCUSED = """(() => {
  const node = document.activeElement;
  const bordered = ["question", "scroller"].includes(node.id) || node === document.body;
  const seen = bordered || getComputedStyle(node).outlineStyle !== "none";
  return [node.getAttribute("aria-label") ?? node.textContent.trim(), seen && node.getBoundingClientRect().width > 1];
})()"""


@needs_browser
def test_keyboard_alone(visit: Visit, stub: Stub) -> None:
    page = visit()
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answer_of(page)
    assert stub.bodies[-1]["messages"][0]["content"] == "one\ntwo"
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Control+k")
    expect(page.locator("#empty")).to_be_visible()
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(tuple(page.evaluate(_FOCUSED)))
    names = {name for name, _ in seen}
    assert {"Settings", "Light or dark", "Model", "Message", "one", "Rename one", "Delete one"} <= names
    assert [name for name, visible in seen if not visible] == []
    page.focus("#chats a")
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(2)


@needs_browser
def test_chats_stay_and_can_be_renamed_deleted_and_brought_back(visit: Visit) -> None:
    page = visit()
    ask(page, "First chat")
    answer_of(page)
    page.keyboard.press("Control+k")
    ask(page, "Second chat")
    answer_of(page)
    page.reload()
    expect(page.locator("article.user .text")).to_have_text("Second chat")
    expect(answer_of(page)).to_have_text("Hello there.")
    expect(page.locator("#chats a")).to_have_text(["Second chat", "First chat"])
    page.hover("#chats li:nth-child(2)")
    page.click("[aria-label='Rename First chat']")
    page.keyboard.type("Better name")
    page.keyboard.press("Enter")
    expect(page.locator("#chats a")).to_have_text(["Second chat", "Better name"])
    page.click("#chats a >> nth=1")
    expect(page.locator("article.user .text")).to_have_text("First chat")
    page.go_back()
    expect(page.locator("article.user .text")).to_have_text("Second chat")
    page.hover("#chats li:nth-child(1)")
    page.click("[aria-label='Delete Second chat']")
    expect(page.locator("#chats a")).to_have_text(["Better name"])
    expect(page.locator("#empty")).to_be_visible()
    page.click("#toast button")
    expect(page.locator("#chats a")).to_have_text(["Second chat", "Better name"])


@needs_browser
def test_an_answer_goes_on_while_another_chat_is_read(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream(*["word "] * 20, "end", pause=0.02)
    page = visit()
    ask(page, "Long")
    page.keyboard.press("Control+k")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#chats li.writing")).to_have_count(1)
    expect(page.locator("#chats li.writing")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    page.click("#chats a")
    expect(answer_of(page)).to_have_text("word " * 20 + "end")


@needs_browser
def test_a_deleted_chat_stops_and_does_not_come_back(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream("word ", pause=0.02, forever=True, stub=stub)
    page = visit()
    ask(page, "Long")
    expect(page.locator("article.assistant .markdown").last).to_contain_text("word")
    page.hover("#chats li")
    page.click("[aria-label='Delete Long']")
    page.wait_for_timeout(100)
    expect(page.locator("#chats li")).to_have_count(0)
    assert page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('gfxlm.chat'))") == []


@needs_browser
def test_answer_again_and_edit(visit: Visit, stub: Stub) -> None:
    page = visit()
    ask(page, "One")
    answer_of(page)
    ask(page, "Two")
    answer_of(page)
    expect(page.locator(".again:visible")).to_have_count(1)
    page.click(".again:visible")
    answer_of(page)
    assert [message["content"] for message in stub.bodies[-1]["messages"]] == ["One", "Hello there.", "Two"]
    page.hover("article.user >> nth=1")
    expect(page.locator(".edit:visible")).to_have_count(1)
    page.click(".edit:visible")
    page.keyboard.press("Escape")
    expect(page.locator("article.user .text")).to_have_text(["One", "Two"])
    page.hover("article.user >> nth=1")
    page.click(".edit:visible")
    page.keyboard.press("Control+a")
    page.keyboard.type("Three")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .text")).to_have_text(["One", "Three"])
    answer_of(page)
    assert [message["content"] for message in stub.bodies[-1]["messages"]] == ["One", "Hello there.", "Three"]
    expect(page.locator("article")).to_have_count(4)


@needs_browser
def test_thoughts_and_tool_calls(visit: Visit, stub: Stub) -> None:
    def calling(body: Any) -> Response:
        async def events() -> Any:
            yield chunk(reasoning_content="I need the weather.", reasoning="I need the weather.")
            call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"city": '}}
            yield chunk(tool_calls=[call]) + chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Ulm"}'}}])
            yield chunk("tool_calls") + "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    stub.answer = calling
    page = visit()
    ask(page, "Weather?")
    answer_of(page)
    expect(page.locator("details .markdown")).to_be_hidden()
    page.click("summary")
    expect(page.locator("details .markdown")).to_have_text("I need the weather.")
    expect(page.locator(".tool")).to_contain_text("weather")
    expect(page.locator(".tool pre")).to_have_text('{ "city": "Ulm" }')
    expect(page.locator(".notice")).to_be_hidden()
    ask(page, "And?")
    answer_of(page)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    assert stub.bodies[-1]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}


@needs_browser
@pytest.mark.parametrize("how", ["wheel", "PageUp", "ArrowUp"])
def test_it_stays_at_the_end_until_the_reader_scrolls_up(visit: Visit, stub: Stub, how: str) -> None:
    stub.answer = lambda body: stream("line\n\n", pause=0.01, forever=True)
    page = visit(viewport={"width": 900, "height": 500})
    from_end = "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.getElementById('scroller'))"
    ask(page, "Many lines")
    until(page, "document.getElementById('scroller').scrollHeight > 1200")
    until(page, f"{from_end} < 60")
    if how == "wheel":
        page.mouse.move(450, 200)
        page.mouse.wheel(0, -400)
    else:
        page.focus("#scroller")
        page.keyboard.press(how)
    expect(page.locator("#to-end")).to_be_visible()
    page.wait_for_timeout(300)  # for a scrolling that is drawn out
    top = page.evaluate("document.getElementById('scroller').scrollTop")
    page.wait_for_timeout(200)
    assert page.evaluate("document.getElementById('scroller').scrollTop") == top
    page.click("#to-end")
    until(page, f"{from_end} < 60")
    expect(page.locator("#to-end")).to_be_hidden()


@needs_browser
def test_on_a_phone(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream("```\n" + "wide " * 100 + "\n```\n\n| a | b |\n|-|-|\n|" + "cell" * 60 + "| x |")
    page = visit(viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)
    page.fill("#question", "Hi")
    page.tap("#send")
    answer_of(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(
        "document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth"
    )
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#open-sidebar")
    expect(page.locator("#sidebar")).to_be_visible()
    expect(page.locator("#open-sidebar")).to_have_attribute("aria-expanded", "true")
    page.tap("#new-chat")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#empty")).to_be_visible()


@needs_browser
def test_copying(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream("Run:\n\n```sh\nmake  test\n```")
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "How?")
    answer_of(page)
    page.click("[aria-label='Copy the code']")
    until(page, "navigator.clipboard.readText().then(text => text === 'make  test')")
    page.click("article.assistant .actions [aria-label=Copy]")
    until(page, "navigator.clipboard.readText().then(text => text.startsWith('Run:'))")
