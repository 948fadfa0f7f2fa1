// Markdown within a line: code, emphasis, links. Returns strings and elements; HTML stays the text that it is.

import { el } from "./dom.js";

const MARKS = /\\|`+|\*+|_+|~~|!?\[|<br ?\/?>|<(?=https?:|mailto:)|https?:\/\/|\n/g;
const ESCAPED = /^[\\`*_~#|<>\-+.!]$/; // not brackets: "\(" and "\[" begin formulas, which stay as written
const PROTOCOLS = ["https:", "http:", "mailto:"];
const DEEPEST = 12;
const LONGEST_LINK = 2000;

/** The nodes of a text; within a link there are no links. */
export function inline(text, depth = 0, linked = false) {
  const marks = new RegExp(MARKS);
  const around = { depth, linked, unclosed: new Set() };
  const nodes = [];
  let done = 0;
  for (let mark = marks.exec(text); mark; mark = marks.exec(text)) {
    const found = depth < DEEPEST && take(text, mark.index, mark[0], around);
    if (!found) continue;
    nodes.push(text.slice(done, mark.index), ...found.nodes);
    done = marks.lastIndex = found.end;
  }
  return [...nodes, text.slice(done)].filter((node) => node !== "");
}

function take(text, at, mark, around) {
  if (mark === "\n" || mark.startsWith("<br")) return { nodes: [el("br")], end: at + mark.length };
  if (mark === "\\") return ESCAPED.test(text[at + 1] ?? "") && { nodes: [text[at + 1]], end: at + 2 };
  if (mark[0] === "`") return takeCode(text, at, mark);
  if (mark === "~~") return takeStruck(text, at, around);
  if (mark[0] === "*" || mark[0] === "_") return takeEmphasis(text, at, mark, around);
  if (around.linked) return null;
  return mark.endsWith("[") ? takeLink(text, at + mark.length, around) : takeAddress(text, at);
}

function codeEnd(text, at, ticks) {
  const runs = /`+/g;
  runs.lastIndex = at;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0] === ticks) return run.index;
  return -1;
}

function takeCode(text, at, ticks) {
  const start = at + ticks.length;
  const end = codeEnd(text, start, ticks);
  if (end < 0) return { nodes: [ticks], end: start };
  const code = text.slice(start, end).replaceAll("\n", " ");
  const padded = /^ .*[^ ].* $/.test(code);
  return { nodes: [el("code", {}, padded ? code.slice(1, -1) : code)], end: end + ticks.length };
}

function takeStruck(text, at, { depth, linked }) {
  const end = text.indexOf("~~", at + 2);
  return end > at + 2 && { nodes: [el("del", {}, ...inline(text.slice(at + 2, end), depth + 1, linked))], end: end + 2 };
}

const isSpace = (character) => character === undefined || /\s/.test(character);
const isWord = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);

/** Where a run closes this mark: of its own length, or of three, which closes two marks at once. Code is passed over. */
function emphasisEnd(text, at, mark) {
  const runs = mark[0] === "*" ? /\\.|`+|\*+/g : /\\.|`+|_+/g;
  runs.lastIndex = at;
  for (let run = runs.exec(text); run; run = runs.exec(text)) {
    if (run[0][0] === "`") {
      const end = codeEnd(text, runs.lastIndex, run[0]);
      if (end >= 0) runs.lastIndex = end + run[0].length;
    } else if (run[0][0] === mark[0] && (run[0].length === mark.length || run[0].length === 3) && !isSpace(text[run.index - 1])) {
      const after = run.index + run[0].length;
      if (mark[0] === "*" || !isWord(text[after])) return after - mark.length;
    }
  }
  return -1;
}

// What found no end once finds none further on: `unclosed` keeps a text of nothing but marks from being searched again and again.
function takeEmphasis(text, at, mark, { depth, linked, unclosed }) {
  const start = at + mark.length;
  const opens = mark.length <= 3 && !unclosed.has(mark) && !isSpace(text[start]) && (mark[0] === "*" || !isWord(text[at - 1]));
  const end = opens ? emphasisEnd(text, start, mark) : -1;
  if (opens && end < 0) unclosed.add(mark);
  if (end <= start) return { nodes: [mark], end: start };
  const inner = inline(text.slice(start, end), depth + 1, linked);
  const node = mark.length === 1 ? el("em", {}, ...inner) : el("strong", {}, ...inner);
  return { nodes: [mark.length === 3 ? el("em", {}, node) : node], end: end + mark.length };
}

function anchor(address, nodes) {
  if (!URL.canParse(address) || !PROTOCOLS.includes(new URL(address).protocol)) return null;
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...nodes);
}

/** What closes the bracket that was opened just before `at`. */
function closing(text, at, open, close) {
  const last = Math.min(text.length, at + LONGEST_LINK);
  for (let depth = 1; at < last; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === open) depth += 1;
    else if (text[at] === close && (depth -= 1) === 0) return at;
  }
  return -1;
}

// An image becomes a link, too: the page fetches nothing from elsewhere.
function takeLink(text, at, { depth }) {
  const middle = closing(text, at, "[", "]");
  if (middle < 0 || text[middle + 1] !== "(") return null;
  const end = closing(text, middle + 2, "(", ")");
  if (end < 0) return null;
  const address = text.slice(middle + 2, end).trim().replace(/^<(.*)>$/, "$1").split(/\s/, 1)[0];
  const label = text.slice(at, middle) || address;
  const node = anchor(address, inline(label, depth + 1, true));
  return node && { nodes: [node], end: end + 1 };
}

function takeAddress(text, at) {
  const bracketed = /<((?:https?|mailto):[^\s<>]+)>/y;
  bracketed.lastIndex = at;
  const inside = bracketed.exec(text);
  const node = inside && anchor(inside[1], [inside[1]]);
  if (node) return { nodes: [node], end: bracketed.lastIndex };
  const bare = /https?:\/\/[^\s<>"`]+/y;
  bare.lastIndex = at;
  let address = bare.exec(text)?.[0] ?? "";
  while (/[.,;:!?'*_~\]]$/.test(address) || (address.endsWith(")") && !address.includes("("))) address = address.slice(0, -1);
  const plain = address && anchor(address, [address]);
  return plain && { nodes: [plain], end: at + address.length };
}
