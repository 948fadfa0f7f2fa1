// Where the question is written: Enter sends, Shift+Enter starts a line. On a touch screen Enter starts a line, too.

import { byId } from "./dom.js";

const field = byId("question");
const send = byId("send");
const stop = byId("stop");
const touch = matchMedia("(pointer: coarse)");
let writing = false;

function settle() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  send.disabled = field.value.trim() === "";
}

/** While an answer is written, the button stops it, and what is typed waits. */
export function showWriting(now) {
  writing = now;
  send.hidden = now;
  stop.hidden = !now;
}

export function focusQuestion() {
  if (!touch.matches) field.focus();
}

export function setUpComposer(onSend, onStop) {
  const submit = () => {
    const text = field.value.trim();
    if (!text || writing) return;
    field.value = "";
    settle();
    onSend(text);
  };
  field.addEventListener("input", settle);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    submit();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  stop.addEventListener("click", onStop);
  settle();
}
