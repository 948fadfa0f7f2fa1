// Markdown as elements. While a text grows, only the blocks that changed are built again.

import { blocks } from "./blocks.js";
import { copyButton } from "./clipboard.js";
import { el } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 12;
const shown = new WeakMap();

/** Make `container` show `text`; its earlier blocks, and what is selected in them, stay. */
export function showMarkdown(container, text) {
  const found = blocks(text);
  const before = shown.get(container) ?? [];
  let same = 0;
  while (same < Math.min(before.length, found.length) && before[same].source === found[same].source) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...found.slice(same).map((block) => build(block, 0)));
  shown.set(container, found);
}

/** Make `container` show `text` as it is. */
export function showPlain(container, text) {
  shown.delete(container);
  container.replaceChildren(el("div", { className: "plain", textContent: text }));
}

const children = (text, depth) => (depth < DEEPEST ? blocks(text).map((block) => build(block, depth + 1)) : [text]);

function build(block, depth) {
  switch (block.kind) {
    case "code":
      return codeBlock(block);
    case "heading":
      return el(`h${Math.min(block.level + 1, 6)}`, {}, ...inline(block.text)); // the page's own title is the h1
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, ...children(block.text, depth));
    case "list":
      return el(block.ordered ? "ol" : "ul", block.ordered ? { start: block.start } : {}, ...block.items.map((item) => el("li", {}, ...children(item, depth))));
    case "table":
      return table(block);
    default:
      return el("p", {}, ...inline(block.text));
  }
}

function codeBlock({ text, language }) {
  const bar = el("div", { className: "code-bar" }, el("span", {}, language), copyButton(() => text, "Copy the code"));
  return el("figure", { className: "code" }, bar, el("pre", { tabIndex: 0 }, el("code", {}, text)));
}

function table({ head, align, rows }) {
  const row = (tag, texts) => el("tr", {}, ...head.map((_, i) => el(tag, { className: align[i] ?? "left" }, ...inline(texts[i] ?? ""))));
  const body = el("tbody", {}, ...rows.map((texts) => row("td", texts)));
  return el("div", { className: "table", tabIndex: 0 }, el("table", {}, el("thead", {}, row("th", head)), body));
}
