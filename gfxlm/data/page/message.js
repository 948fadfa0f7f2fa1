// One message on the page: a question that can be edited, an answer that grows.

import { describeCounts } from "./answer.js";
import { copyButton } from "./clipboard.js";
import { el, iconButton } from "./dom.js";
import { showMarkdown, showPlain } from "./markdown.js";

const ENDINGS = {
  length: "The answer was cut off at the limit of tokens.",
  stopped: "Stopped.",
  interrupted: "This answer was interrupted.",
};

/** A question; `onEdit(text)` gets the text that shall replace it. */
export function questionView(message, onEdit) {
  const text = el("div", { className: "text", textContent: message.content });
  const view = el("article", { className: "message user", "aria-label": "You" });
  const edit = iconButton("edit", "Edit", () => view.replaceChildren(editor(message.content, onEdit, show)), "edit");
  const actions = el("div", { className: "actions" }, copyButton(() => message.content), edit);
  const show = () => view.replaceChildren(text, actions);
  show();
  return view;
}

function editor(text, onEdit, onCancel) {
  const field = el("textarea", { value: text, rows: Math.min(12, text.split("\n").length + 1), "aria-label": "Edit the message" });
  const save = () => field.value.trim() && onEdit(field.value);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    } else if (event.key === "Escape") {
      event.stopPropagation(); // which would stop an answer
      onCancel();
    }
  });
  const buttons = el(
    "div",
    { className: "buttons" },
    el("button", { type: "button", className: "quiet", onclick: onCancel }, "Cancel"),
    el("button", { type: "button", className: "solid", onclick: save }, "Send"),
  );
  queueMicrotask(() => field.focus());
  return el("div", { className: "editor" }, field, buttons);
}

/** An answer; `update(writing)` shows what has come since. `onAgain` asks for it anew, `onKey` lets the reader enter a key. */
export class AnswerView {
  constructor(answer, { plain, onAgain, onKey }) {
    this.answer = answer;
    this.plain = plain;
    this.handlers = { onAgain, onKey };
    this.thoughts = el("div", { className: "markdown" });
    this.summary = el("summary");
    this.reasoning = el("details", { className: "reasoning", hidden: true }, this.summary, this.thoughts);
    this.text = el("div", { className: "markdown" });
    this.tools = el("div", { className: "tools" });
    this.notice = el("div", { className: "notice", hidden: true });
    this.counts = el("span", { className: "counts" });
    const again = iconButton("again", "Answer again", onAgain, "again");
    this.copy = copyButton(() => answer.content);
    const actions = el("div", { className: "actions" }, this.copy, again, this.counts);
    this.node = el("article", { className: "message assistant", "aria-label": "Answer" }, this.reasoning, this.text, this.tools, this.notice, actions);
    this.openedByHand = false;
    this.summary.addEventListener("click", () => (this.openedByHand = true));
  }

  update(writing) {
    const { answer } = this;
    this.node.setAttribute("aria-busy", String(writing));
    this.copy.hidden = !answer.content;
    (this.plain ? showPlain : showMarkdown)(this.text, answer.content);
    this.updateReasoning(writing);
    this.tools.replaceChildren(...answer.toolCalls.filter(Boolean).map(toolView));
    this.counts.textContent = describeCounts(answer);
    this.counts.title = answer.timings?.prompt_per_second ? `Prompt read at ${answer.timings.prompt_per_second.toFixed(0)} tokens/s` : "";
    this.updateNotice(writing);
  }

  updateReasoning(writing) {
    const { answer, reasoning } = this;
    const thinking = writing && !answer.content && !answer.toolCalls.length;
    reasoning.hidden = !answer.reasoning;
    this.summary.textContent = thinking ? "Thinking …" : "Thoughts";
    if (!this.openedByHand) reasoning.open = thinking;
    if (answer.reasoning) (this.plain ? showPlain : showMarkdown)(this.thoughts, answer.reasoning);
  }

  updateNotice(writing) {
    const { answer, notice } = this;
    const unfinished = answer.finish === undefined && !answer.error;
    const text = answer.error?.message ?? ENDINGS[unfinished ? "interrupted" : answer.finish];
    notice.hidden = writing || !text;
    if (notice.hidden) return;
    notice.classList.toggle("error", Boolean(answer.error));
    if (answer.error) notice.setAttribute("role", "alert");
    const button = (label, onclick) => el("button", { type: "button", className: "quiet", onclick }, label);
    const remedies = [];
    if (answer.error?.kind === "key") remedies.push(button("Enter a key", this.handlers.onKey));
    if (answer.error) remedies.push(button("Try again", this.handlers.onAgain));
    notice.replaceChildren(el("span", {}, text), ...remedies);
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still growing, or not JSON: as it is
  }
}

function toolView({ function: call }) {
  const bar = el("div", { className: "code-bar" }, el("span", {}, "calls ", el("code", {}, call.name)));
  return el("figure", { className: "code tool" }, bar, el("pre", { tabIndex: 0 }, el("code", {}, pretty(call.arguments))));
}
