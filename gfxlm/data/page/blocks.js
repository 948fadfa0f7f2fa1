// Markdown's blocks: which lines of a text belong together. Pure text, no elements.

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DELIMITERS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;

const indentOf = (line) => line.search(/[^ ]|$/);
const isBlank = (line) => line.trim() === "";
const isOrdered = (item) => item[2].length > 1;
const itemOf = (line) => (RULE.test(line) ? null : ITEM.exec(line));
const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1]);

/**
 * The blocks of a text, in order. Each has `kind`, `source` (its lines, joined), and by kind: code `text`, `language`;
 * heading `level`, `text`; quote `text`; list `ordered`, `start`, `items` (texts); table `head`, `rows`, `align`; paragraph `text`.
 */
export function blocks(text) {
  const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const { end, ...block } = takeFence(lines, at) ?? takeLine(lines, at) ?? takeQuote(lines, at) ?? takeList(lines, at) ?? takeTable(lines, at) ?? takeParagraph(lines, at);
    found.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return found;
}

function takeFence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const indent = indentOf(lines[at]);
  const closes = (line) => line.trim().startsWith(open[1]) && line.trim().replaceAll(open[1][0], "") === "";
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return { kind: "code", language: open[2], text: code.join("\n"), end: Math.min(end + 1, lines.length) };
}

function takeLine(lines, at) {
  const heading = HEADING.exec(lines[at]);
  if (heading) return { kind: "heading", level: heading[1].length, text: heading[2].trim().replace(/ #+$/, ""), end: at + 1 };
  return RULE.test(lines[at]) ? { kind: "rule", end: at + 1 } : null;
}

function takeQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return end > at ? { kind: "quote", text: lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n"), end } : null;
}

/** Two spaces more than the bullet's are inside an item, though a number is wider: that is how models write. */
function takeList(lines, at) {
  const first = itemOf(lines[at]);
  if (!first) return null;
  const inside = first[1].length + 2;
  const isSibling = (line) => itemOf(line)?.[1].length < inside && isOrdered(itemOf(line)) === isOrdered(first);
  const items = [];
  let end = at;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (isSibling(line)) items.push({ lines: [line.slice(itemOf(line)[0].length)] });
    else if (isBlank(line)) {
      const next = lines.slice(end).find((later) => !isBlank(later));
      if (next === undefined || (!isSibling(next) && indentOf(next) < inside)) break;
      items.at(-1).lines.push("");
    } else if (indentOf(line) >= inside) {
      const item = items.at(-1);
      item.shift ??= indentOf(line);
      item.lines.push(line.slice(Math.min(item.shift, indentOf(line))));
    } else if (!isBlank(lines[end - 1]) && !startsBlock(lines, end)) items.at(-1).lines.push(line.trim());
    else break;
  }
  return { kind: "list", ordered: isOrdered(first), start: parseInt(first[2], 10), items: items.map((item) => item.lines.join("\n")), end };
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return trimmed.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function takeTable(lines, at) {
  if (!isTable(lines, at)) return null;
  const align = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) end += 1;
  return { kind: "table", head: cells(lines[at]), align, rows: lines.slice(at + 2, end).map(cells), end };
}

function startsBlock(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || isTable(lines, at);
}

// Lines keep their indent: code without a fence stays readable.
function takeParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trimEnd()).join("\n"), end };
}
