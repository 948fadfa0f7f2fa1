"""What the page makes of a model's text: its Markdown, and nothing that could run."""

import re
from typing import Any

import pytest

from tests.server.page_browser import Visit, answer_of, ask, browser, expect, needs_browser, stub, visit
from tests.server.page_stub import Stub, stream

__all__ = ["browser", "stub", "visit"]  # the fixtures

# What is shown, as HTML without what stands around code and tables. Links open elsewhere, or are left as they are.
_SHOW = """async (texts) => {
  const { showMarkdown } = await import("/page/markdown.js");
  const container = document.createElement("div");
  for (const text of texts) showMarkdown(container, text);
  for (const figure of container.querySelectorAll("figure")) {
    const code = figure.querySelector("code");
    code.setAttribute("lang", figure.querySelector("span").textContent);
    figure.replaceWith(code);
  }
  for (const table of container.querySelectorAll(".table")) table.replaceWith(table.firstChild);
  for (const link of container.querySelectorAll("a[target=_blank][rel='noopener noreferrer']")) {
    link.removeAttribute("target");
    link.removeAttribute("rel");
  }
  return container.innerHTML;
}"""

TEXTS = {
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "def f():\n    return 1  ": "<p>def f():<br>    return 1</p>",
    "**b** *i* _i_ __b__": "<p><strong>b</strong> <em>i</em> <em>i</em> <strong>b</strong></p>",
    "***bi*** ~~s~~": "<p><em><strong>bi</strong></em> <del>s</del></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "*a **b** c*": "<p><em>a <strong>b</strong> c</em></p>",
    "**a *b***": "<p><strong>a <em>b</em></strong></p>",
    "snake_case_name, 2 * 3 * 4, **open": "<p>snake_case_name, 2 * 3 * 4, **open</p>",
    "`a_b*c*`, ``x ` y``, `open": "<p><code>a_b*c*</code>, <code>x ` y</code>, `open</p>",
    "**use `a**b` here**": "<p><strong>use <code>a**b</code> here</strong></p>",
    r"\*not\* \(a_1\)": r"<p>*not* \(a_1\)</p>",
    "a < b & c > d &amp;": "<p>a &lt; b &amp; c &gt; d &amp;amp;</p>",
    "# T\n### U ##\ntext": "<h2>T</h2><h4>U</h4><p>text</p>",
    "#hash": "<p>#hash</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "- a\n- b\n  - c\n\n    d\n- e": "<ul><li>a</li><li>b<ul><li>cd</li></ul></li><li>e</li></ul>",
    "1. a\n  - x\n    - y\n2. b": '<ol start="1"><li>a<ul><li>x<ul><li>y</li></ul></li></ul></li><li>b</li></ol>',
    "3) c\n\n   ```\n   x\n\n     y\n   ```": '<ol start="3"><li>c<code lang="">x\n\n  y</code></li></ol>',
    "- a\n1. b": '<ul><li>a</li></ul><ol start="1"><li>b</li></ol>',
    "in 2024. Then": "<p>in 2024. Then</p>",
    "> a\n> - b\n\nc": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>",
    "```py\nx = '<b>'\n```\nafter": "<code lang=\"py\">x = '&lt;b&gt;'</code><p>after</p>",
    "~~~\n```\n~~~": '<code lang="">```</code>',
    "```\nnot closed": '<code lang="">not closed</code>',
    "| a | b |\n|:-|-:|\n| `x` \\| y | **2** |\n| only": (
        '<table><thead><tr><th class="left">a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr><td class="left"><code>x</code> | y</td><td class="right"><strong>2</strong></td></tr>'
        '<tr><td class="left">only</td><td class="right"></td></tr></tbody></table>'
    ),
    "a | b": "<p>a | b</p>",
    "[t](https://a.org/x_(y)_z 'title')": '<p><a href="https://a.org/x_(y)_z">t</a></p>',
    "<https://b.org>": '<p><a href="https://b.org">https://b.org</a></p>',
    "(see https://a.org/b_c.)": '<p>(see <a href="https://a.org/b_c">https://a.org/b_c</a>.)</p>',
    "![a *cat*](https://a.org/c.png)": '<p><a href="https://a.org/c.png">a <em>cat</em></a></p>',
    "[https://a.org](https://b.org)": '<p><a href="https://b.org">https://a.org</a></p>',
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](JaVaScRiPt:1) [y](data:text/html,z)": "<p>[x](JaVaScRiPt:1) [y](data:text/html,z)</p>",
    "[z](/v1/models)": "<p>[z](/v1/models)</p>",
    "<script>x()</script>": "<p>&lt;script&gt;x()&lt;/script&gt;</p>",
    "<img src=x onerror=x()>": "<p>&lt;img src=x onerror=x()&gt;</p>",
    "a<br>b<br/>c": "<p>a<br>b<br>c</p>",
    "": "",
}

HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1"> <svg onload="window.hacked = 1">
[click](javascript:window.hacked=1) [click]( java\tscript:window.hacked=1 ) <javascript:window.hacked=1>
![img](https://evil.example/pixel.png) [l](https://evil.example/" onmouseover="window.hacked=1)
<iframe src="https://evil.example"></iframe> <style>body { display: none }</style>

```"><script>window.hacked = 1</script>
<script>window.hacked = 1</script>
```

| <img src=x onerror=window.hacked=1> | b |
|--|--|
| [x](vbscript:1) | <a href="javascript:window.hacked=1">x</a> |
"""


def _tight(html: str) -> str:
    """Without the paragraphs within items, which the style shows as plain lines."""
    return re.sub(r"<li>.*</li>", lambda items: re.sub(r"</?p>", "", items[0]), html, flags=re.DOTALL)


@pytest.fixture
def show(visit: Visit) -> Any:
    page = visit()
    return lambda *texts: page.evaluate(_SHOW, list(texts))


@needs_browser
def test_markdown(show: Any) -> None:
    wrong = {text: (shown, wanted) for text, wanted in TEXTS.items() if (shown := _tight(show(text))) != wanted}
    assert wrong == {}


@needs_browser
def test_a_text_that_grows_ends_as_if_it_had_come_at_once(show: Any) -> None:
    text = "\n\n".join([*TEXTS, HOSTILE])
    prefixes = [text[:end] for end in range(1, len(text), 3)]
    assert show(*prefixes, text) == show(text)


@needs_browser
@pytest.mark.parametrize(
    "text",
    [
        "*" * 20000,
        "_a " * 10000,
        "[" * 20000,
        "`" * 9999 + " `",
        ">" * 5000,
        "[a](" * 5000,
        "- " * 2000,
        "**a *b " * 3000,
    ],
)
def test_no_text_takes_long_or_is_too_deep(show: Any, visit: Visit, text: str) -> None:
    page = visit()
    seconds = page.evaluate(
        """async (text) => { const { showMarkdown } = await import("/page/markdown.js");
        const start = performance.now(); showMarkdown(document.createElement("div"), text);
        return (performance.now() - start) / 1000 }""",
        text,
    )
    assert seconds < 1.0


@needs_browser
def test_what_a_model_says_stays_text(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream(
        *[HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)], reasoning_content=HOSTILE
    )
    page = visit()
    ask(page, HOSTILE)
    text = answer_of(page)
    expect(text).to_contain_text("<script>window.hacked = 1</script>")
    page.click("summary")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    made = page.evaluate("[...new Set([...document.querySelectorAll('#transcript *')].map(node => node.localName))]")
    assert not {"script", "img", "iframe", "style"} & set(made)
    links = page.evaluate("[...document.querySelectorAll('#transcript a')].map(node => node.protocol)")
    assert set(links) == {"https:"}
    names = page.evaluate("[...document.querySelectorAll('#transcript *')].flatMap(node => node.getAttributeNames())")
    assert not [name for name in names if name.startswith("on")]
    page.reload()
    expect(answer_of(page)).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None
    assert page.title().startswith("<script>")


@needs_browser
def test_plain_text_is_a_setting(visit: Visit, stub: Stub) -> None:
    stub.answer = lambda body: stream("# a *b*\n  c")
    page = visit()
    page.click("#open-settings")
    page.select_option("[name=format]", "plain")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    assert answer_of(page).inner_text() == "# a *b*\n  c"
    page.click("#open-settings")
    page.select_option("[name=format]", "")
    page.keyboard.press("Escape")
    expect(answer_of(page).locator("h2")).to_have_text("a b")
